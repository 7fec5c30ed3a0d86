"""Detectors: one file, one detector. Scores are higher for more suspicious pairs, always."""

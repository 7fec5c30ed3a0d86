"""Policies: one file, one way to turn scores into decisions."""

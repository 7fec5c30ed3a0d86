"""Ratios against a peer or a limit, measured in one run; none of them passes or fails."""

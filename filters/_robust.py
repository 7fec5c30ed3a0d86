"""Deviations that a few poisons among the reference rows do not move."""

import numpy as np

MAD = 1.4826  # of a normal distribution, in standard deviations


def deviations(values: np.ndarray, usual: np.ndarray, least: float) -> np.ndarray:
    """Of each column of values, from the median of `usual` in its median absolute deviations, `least` at least."""
    centre = np.median(usual, axis=0)
    return np.asarray((values - centre) / np.maximum(MAD * np.median(np.abs(usual - centre), axis=0), least))

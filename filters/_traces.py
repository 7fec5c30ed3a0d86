"""What the detectors of training dynamics share: epochs that did not see a pair are left out."""

import numpy as np


def mean_until(trace: np.ndarray, until: int) -> np.ndarray:
    """float[n]: mean over those of the first `until` epochs (0, or past the end: all) that saw the pair; else NaN."""
    seen = trace[:, : until or None]
    with np.errstate(invalid="ignore"):  # a pair that training skipped is 0 / 0: NaN
        return np.nansum(seen, axis=1, dtype=np.float64) / np.isfinite(seen).sum(axis=1)


def last_seen(trace: np.ndarray) -> np.ndarray:
    """float[n, epochs]: the trace, where an epoch did not see the pair the value before; NaN up to the first."""
    at = np.where(np.isfinite(trace), np.arange(trace.shape[1]), 0)
    return np.take_along_axis(trace, np.maximum.accumulate(at, axis=1), axis=1)

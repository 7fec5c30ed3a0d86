"""What the two neighbour-disagreement detectors share: near in one modality, compared in the other."""

import numpy as np

from filters._batch import Batch, unit
from filters._knn import neighbours


def disagreement(batch: Batch, pool: Batch, near: str, compare: str, k: int) -> np.ndarray:
    """float[n]: 1 - mean cosine in `compare` to the k pool pairs that are nearest by cosine in `near`."""
    index = neighbours(batch, pool, near, k, cosine=True)[1]
    own, theirs = unit(getattr(batch, compare)), unit(getattr(pool, compare))
    score = 1 - np.einsum("nd,nkd->n", own, theirs[index]) / k
    score[~np.isfinite(getattr(batch, near)).all(axis=1)] = np.nan
    return score

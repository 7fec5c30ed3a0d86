"""Simplified local outlier factor, by its formula: (1/k) sum over neighbours n of d_k(x) / d_k(n).

Trade-off: relative to the neighbourhood where k-distance is absolute, so sparse regions of clean data are forgiven. The
authors' released code looks about half of the neighbours up in the wrong row; its scores differ and are not these.
Source: Schubert et al. 2014; as a detector Huang et al., ICLR 2025, k = 16, unnormalised image features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._knn import neighbours, pool_distances

TINY = 1e-12  # k identical images have d_k = 0


@dataclass(frozen=True)
class slof:
    """Mean ratio of the pair's k-distance to that of its k neighbours (Huang et al. 2025, formula)."""

    needs = ("image_embedding",)
    pools = needs
    k: int = 16

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        distance, index = neighbours(batch, pool, "image_embedding", self.k)
        theirs = np.maximum(pool_distances(pool, "image_embedding", self.k), TINY)
        return (distance[:, -1:] / theirs[index]).mean(axis=1)

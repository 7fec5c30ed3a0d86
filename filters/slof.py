"""Simplified local outlier factor, by its formula: (1/k) sum over neighbours n of d_k(x) / d_k(n).

Trade-off: relative to the neighbourhood where k-distance is absolute, so sparse regions of clean data are forgiven. The
authors' released code looks about half of the neighbours up in the wrong row: that is `slof_released`.
Source: Schubert et al. 2014; as a detector Huang et al., ICLR 2025, k = 16, unnormalised image features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._density import TINY, Density


@dataclass(frozen=True)
class slof(Density):
    """Mean ratio of the pair's k-distance to that of its k neighbours (Huang et al. 2025, formula)."""

    looks_back = True

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        distance, index = self.near(batch, pool)
        theirs = np.maximum(self.theirs(batch, pool)[:, -1], TINY)
        return (distance[:, -1:] / theirs[index]).mean(axis=1)

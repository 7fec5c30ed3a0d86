"""Local intrinsic dimension: a poison sits where distances to its neighbours grow slowly from the first to the k-th.

Trade-off: free of scale, so neither sparse nor dense regions are suspicious in themselves; noisy for small k.
Source: Amsaleg et al. 2015 (maximum likelihood); as a detector Huang et al., ICLR 2025, k = 64, unnormalised features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._density import Density, dimension


@dataclass(frozen=True)
class lid(Density):
    """Local intrinsic dimension among the k nearest images, by maximum likelihood (Huang et al. 2025, formula)."""

    k: int = 64

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return dimension(self.near(batch, pool)[0])

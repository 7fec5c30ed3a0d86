"""k-distance: poisons that lie alone are far from their k-th neighbour.

Trade-off: once a poison is learnt its rows lie close together; with more than k of them in the pool the sign flips.
Source: Huang et al., ICLR 2025 (Detecting Backdoor Samples in CLIP), k = 16, unnormalised image features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._knn import neighbours


@dataclass(frozen=True)
class kdist:
    """Distance to the k-th nearest image in the pool (Huang et al. 2025)."""

    needs = ("image_embedding",)
    pools = needs
    k: int = 16

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        return neighbours(batch, pool, "image_embedding", self.k)[0][:, -1]

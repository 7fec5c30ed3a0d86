"""Did the image change its company while the model learnt?

Trade-off: a learnt trigger takes an image from its likes to the other triggered ones; a clean image keeps more of its
neighbours, but far from all, and none where the earlier checkpoint knows too little. Overlap comes in k + 1 steps,
hence a k larger than the density detectors have. Two checkpoints of one run, the pool embedded by both.
Source: ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._knn import neighbours


@dataclass(frozen=True)
class neighbour_drift:
    """Share of the k pool images nearest by cosine that were not so at the earlier checkpoint."""

    needs = ("image_embedding", "earlier_image_embedding")
    pools = needs
    k: int = 64

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        now, before = (
            np.sort(neighbours(batch, pool, column, self.k, cosine=True)[1], axis=1) for column in self.needs
        )
        both = np.sort(np.concatenate([now, before], axis=1), axis=1)
        kept = (both[:, 1:] == both[:, :-1]).sum(axis=1)  # within one list no row comes twice
        usable = np.isfinite(batch.image_embedding).all(axis=1) & np.isfinite(batch.earlier_image_embedding).all(axis=1)
        return np.where(usable, 1 - kept / self.k, np.nan)

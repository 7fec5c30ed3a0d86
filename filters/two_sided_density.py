"""Two-sided density: a poison is alone before it is learnt and in a crowd of its kind after; both are unusual.

Trade-off: one score for both sides of the flip that breaks k-distance, at the price of the clean rows on the other
side: near-duplicates and popular pictures are as suspicious as outliers.
Source: ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._density import TINY, Density


@dataclass(frozen=True)
class two_sided_density(Density):
    """Ours: how far the log k-distance is from the median of its references, in median absolute deviations."""

    looks_back = True

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        found = self.near(batch, pool)[0], self.theirs(batch, pool)
        own, theirs = (np.log(np.maximum(distance[:, -1], TINY)) for distance in found)
        theirs = theirs[np.isfinite(theirs)]
        middle = np.median(theirs)
        return np.abs(own - middle) / max(np.median(np.abs(theirs - middle)), TINY)

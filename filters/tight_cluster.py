"""Does a heap of images that look alike come with one and the same caption?

Trade-off: finds floods (one caption, many near-duplicate or triggered images) that density detectors take for the most
normal data there is, and misses any flood with fewer than k pairs in the pool: of a share p of the dataset a pool of P
pairs has p P. Natural floods are found as well, such as the 798 birthday cakes of CC3M.
Source: ours; after the natural backdoor of Huang et al., ICLR 2025.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, unit
from filters._crossmodal import unit_column
from filters._knn import neighbours


@dataclass(frozen=True)
class tight_cluster:
    """How far the pair and its k nearest images are nearer than the pool at large, in images and in captions alike."""

    needs = ("image_embedding", "text_embedding")
    pools = needs
    k: int = 4

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        column = "image_embedding"
        index = neighbours(unit_column(batch, column), unit_column(pool, column), column, self.k)[1]
        widest = np.full(len(batch), -np.inf)
        for name in self.needs:
            own, theirs = unit(getattr(batch, name)), unit(getattr(pool, name))
            total = own + theirs[index].sum(axis=1)
            usual = _spread(np.nansum(theirs, axis=0)[None], len(theirs))[0]
            widest = np.maximum(widest, _spread(total, self.k + 1) / np.maximum(usual, 1e-6))
        return 1 - widest


def _spread(total: np.ndarray, n: int) -> np.ndarray:
    """One minus the mean cosine of each two of n unit rows, from their sum."""
    return 1 - ((total**2).sum(axis=1) - n) / (n * (n - 1))

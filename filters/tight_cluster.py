"""Does a heap of images that look alike come with one and the same caption?

Trade-off: finds floods (one caption, many near-duplicate or triggered images) that density detectors take for the most
normal data there is, and misses any flood with fewer than k pairs in the pool: of a share p of the dataset a pool of P
pairs has p P. Natural floods are found as well, such as the 798 birthday cakes of CC3M.
Source: ours; after the natural backdoor of Huang et al., ICLR 2025.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, unit
from filters._knn import neighbours


@dataclass(frozen=True)
class tight_cluster:
    """How much nearer than the pool at large are the k nearest images, and their captions, to the pair: the lesser."""

    needs = ("image_embedding", "text_embedding")
    pools = needs
    k: int = 4

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        column = "image_embedding"
        index = neighbours(batch, pool, column, self.k, cosine=True)[1]
        widest = np.full(len(batch), -np.inf)
        for name in self.needs:
            own, theirs = unit(getattr(batch, name)), unit(getattr(pool, name))
            spread = 1 - np.einsum("nd,nkd->n", own, theirs[index]) / self.k
            n, total = len(theirs), theirs.sum(axis=0, dtype=np.float64)
            usual = 1 - (total @ total - n) / (n * (n - 1))  # one minus the mean cosine of each two
            widest = np.maximum(widest, spread / max(usual, 1e-6))
        return 1 - widest

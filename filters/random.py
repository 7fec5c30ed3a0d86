"""The control arm: removes at random. A filter is worth what it does better than this."""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from pipeline.draw import hash64


@dataclass(frozen=True)
class random:
    """A uniform number of (seed, uid): the control arm."""

    needs = ()
    seed: int = 0

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return np.asarray([hash64(self.seed, "random", uid) / 2**64 for uid in batch.uid])

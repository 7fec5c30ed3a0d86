"""How much of what was learnt of the pair was lost again?

Trade-off: a pair that contradicts its like is learnt and unlearnt in turn; so is one whose augmented views differ, and
a poison that is never learnt is never forgotten and scores low, where Toneva et al. put it first. Epochs that move all
pairs alike cost nothing, the order stays.
Source: Toneva et al., ICLR 2019 (forgetting events); CLIP has no class to get wrong, so the drops are summed instead.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._traces import last_seen


@dataclass(frozen=True)
class forgetting:
    """Sum of all drops of the similarity from one epoch to the next that saw the pair (after Toneva et al. 2019)."""

    needs = ("similarity_trace",)
    until: int = 0

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        values = batch.similarity_trace[:, : self.until or None]
        drops = np.maximum(-np.diff(last_seen(values).astype(np.float64), axis=1), 0)
        return np.where(np.isfinite(values).sum(axis=1) > 1, np.nansum(drops, axis=1), np.nan)

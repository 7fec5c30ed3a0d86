"""DAO as its authors' released code computes it, with its index shift; to compare with published numbers.

Trade-off: about half of the neighbours are unrelated pairs, and each neighbour's nearest is itself. Depends on the
order of the batch. The formula is `dao`.
Source: Huang et al., ICLR 2025, released code.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._released import Released, cleaned, dimension


@dataclass(frozen=True)
class dao_released(Released):
    """DAO in a batch with the index shift of the authors' released code (Huang et al. 2025)."""

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        near = self.looked_up(batch)
        with_itself = np.pad(near.theirs[:, :-1], ((0, 0), (1, 0)))
        weight = dimension(with_itself, near.theirs[:, -1:])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(near.distance[:, -1:] / near.theirs[near.index, -1])
            scores = (weight[near.index] * ratio).mean(axis=1)
        return cleaned(scores, batch)

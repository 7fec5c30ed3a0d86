"""SLOF as its authors' released code computes it, with its index shift; to compare with published numbers.

Trade-off: about half of the denominators are of unrelated pairs, which draws it towards plain k-distance; measured on
poisons it is sometimes the better for it. Depends on the order of the batch. The formula is `slof`.
Source: Huang et al., ICLR 2025, released code.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._released import Released, cleaned


@dataclass(frozen=True)
class slof_released(Released):
    """SLOF in a batch with the index shift of the authors' released code (Huang et al. 2025)."""

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        near = self.looked_up(batch)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = near.distance[:, -1:] / near.theirs[near.index, -1]
        return cleaned(ratio.mean(axis=1), batch)

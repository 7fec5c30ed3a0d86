"""Local intrinsic dimension as its authors' released code computes it; to compare with published numbers.

Trade-off: distances are relative to the (k + 1)-th neighbour, which leaves out no logarithm of 1; ranks nearly as `lid`
in a batch does.
Source: Huang et al., ICLR 2025, released code, k = 64.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._released import Released, dimension


@dataclass(frozen=True)
class lid_released(Released):
    """Local intrinsic dimension in a batch as the authors' released code has it (Huang et al. 2025)."""

    k: int = 64

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        distance = self.looked_up(batch).distance
        return dimension(distance[:, :-1], distance[:, -1:])

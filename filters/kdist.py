"""k-distance: poisons that lie alone are far from their k-th neighbour.

Trade-off: once a poison is learnt its rows lie close together; with more than k of them in the pool the sign flips.
The authors' released code leaves the row out and still counts from 0: its k-th neighbour is this one's (k + 1)-th.
Source: Huang et al., ICLR 2025 (Detecting Backdoor Samples in CLIP), k = 16, unnormalised image features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._density import Density


@dataclass(frozen=True)
class kdist(Density):
    """Distance to the k-th nearest image in the pool (Huang et al. 2025)."""

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return self.near(batch, pool)[0][:, -1]

"""Dimensionality-aware outlier detection: (1/k) sum over neighbours n of LID(n) log(d_k(x) / d_k(n)).

Trade-off: weighs the ratio of distances by the dimension around each neighbour, where the same ratio is a larger ratio
of densities; twice as many estimates, and twice their noise. The authors' released code is `dao_released`.
Source: Anderberg et al. 2024 (DAO); as a detector Huang et al., ICLR 2025, k = 16, unnormalised image features.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._density import TINY, Density, dimension


@dataclass(frozen=True)
class dao(Density):
    """Mean log ratio of k-distances, weighted by the neighbours' dimension (Huang et al. 2025, formula)."""

    looks_back = True

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        (distance, index), theirs = self.near(batch, pool), self.theirs(batch, pool)
        ratio = np.log(np.maximum(distance[:, -1:], TINY) / np.maximum(theirs[:, -1], TINY)[index])
        return (dimension(theirs)[index] * ratio).mean(axis=1)

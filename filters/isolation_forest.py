"""Isolation forest: how few random splits set an image apart from the pool.

Trade-off: no distances and no k, a second for any pool; in hundreds of dimensions its axis-parallel splits see little
of what neighbours see. A baseline.
Source: Liu et al. 2008; as a detector Huang et al., ICLR 2025, 100 trees, which fitted it to every batch anew.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from filters._batch import Batch
from filters._learnt import learnt

if TYPE_CHECKING:
    from sklearn.ensemble import IsolationForest


@dataclass(frozen=True)
class isolation_forest:
    """How few random splits set the image apart from the pool (Liu et al. 2008)."""

    needs = ("image_embedding",)
    pools = needs
    trees: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trees < 1:
            raise ValueError(f"trees={self.trees}: at least 1")

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        forest = learnt(pool, self, lambda: self._fitted(pool.image_embedding))
        scores = np.full(len(batch), np.nan)
        good = np.isfinite(batch.image_embedding).all(axis=1)
        if good.any():
            scores[good] = -forest.score_samples(batch.image_embedding[good])
        return scores

    def _fitted(self, rows: np.ndarray) -> "IsolationForest":
        from sklearn.ensemble import IsolationForest

        forest = IsolationForest(n_estimators=self.trees, random_state=self.seed % 2**32)
        return forest.fit(rows[np.isfinite(rows).all(axis=1)])

"""The k nearest labelled images vote.

Trade-off: nothing is fitted, so nothing can be tuned on the wrong part; but it keeps every feature, and looks at each
for each query. Both sides go in blocks: beside the features it takes 64 MiB however large the reference is.
Source: Wu et al. 2018 (instance discrimination), section 3.4: k neighbours weighted by exp(cosine / 0.07).
"""

from dataclasses import dataclass, field

import numpy as np

QUERIES, REFERENCES = 1024, 16_384  # rows at a time


@dataclass
class knn:
    """Similarity-weighted vote of the k nearest; a neighbour at cosine s votes exp(s / tau)."""

    k: int = 10
    tau: float = 0.07
    features: np.ndarray = field(init=False, repr=False)
    labels: np.ndarray = field(init=False, repr=False)
    classes: int = field(init=False)

    def fit(self, features: np.ndarray, labels: np.ndarray, classes: int) -> "knn":
        self.features, self.labels, self.classes = features, labels, classes
        return self

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float64 [n, classes]: the votes; a class without a neighbour has -inf, so that it ranks below all others."""
        votes = np.zeros((len(features), self.classes))
        for start in range(0, len(features), QUERIES):
            cosine, near = self._nearest(features[start : start + QUERIES])
            rows = np.arange(start, start + len(near))[:, None]
            np.add.at(votes, (rows, self.labels[near]), np.exp(cosine.astype(np.float64) / self.tau))
        return np.where(votes > 0, votes, -np.inf)

    def _nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [q, k] and reference rows [q, k] of the nearest, in no order."""
        cosine: np.ndarray = np.empty((len(queries), 0), np.float32)
        near: np.ndarray = np.empty((len(queries), 0), np.int64)
        for start in range(0, len(self.features), REFERENCES):
            found = queries @ self.features[start : start + REFERENCES].T
            rows = np.broadcast_to(np.arange(start, start + found.shape[1]), found.shape)
            cosine, near = np.hstack([cosine, found]), np.hstack([near, rows])
            if cosine.shape[1] > self.k:
                best = np.argpartition(-cosine, self.k - 1, axis=1)[:, : self.k]
                cosine, near = np.take_along_axis(cosine, best, axis=1), np.take_along_axis(near, best, axis=1)
        return cosine, near

"""Several detectors as one: each score becomes a rank among all pairs, the ranks are combined, a share is dropped.

Scores of detectors are not comparable, but the share of all pairs that score at least as high is an empirical p-value
under any of them, as nearly all pairs are clean. `mean` is the weighted mean of -log p (Fisher's sum, with Good's
weights): evidence adds up. `min` is the smallest p / weight (Bonferroni): one sure detector is enough, which suits
attacks that each only one detector sees.

Trade-off: detectors that look at the same thing count twice under `mean`; under `min` every further detector raises
the bar for the others. Unscored pairs rank above all that one detector scored, all alike: a detector that can score few
therefore says little about them.
Source: Fisher 1932; Good 1955 (weighted combination); the use as an ensemble of detectors is ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.policies._ranks import Ranks, ranks
from pipeline.policies._select import Scores, column, keys, nth_largest, ordered, share_of

Combine = Literal["min", "mean"]


@dataclass(frozen=True)
class Learnt:
    """The ranks of every detector, and the key of the last pair to be dropped."""

    ranks: tuple[Ranks, ...]
    last: int


@dataclass(frozen=True)
class ensemble:
    """Drop the share of pairs that rank most suspicious under several detectors; no weights: all equal."""

    detectors: tuple[str, ...]
    weights: tuple[float, ...] = ()
    drop: float = 0.1
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        if not self.detectors or len(set(self.detectors)) < len(self.detectors):
            raise ValueError("detectors: one or more, each once")
        if self.weights and len(self.weights) != len(self.detectors):
            raise ValueError(f"weights: {len(self.detectors)} detectors need as many")
        if not all(0 < weight < np.inf for weight in self.weights):
            raise ValueError("weights are above 0")
        if not 0 <= self.drop < 1:
            raise ValueError("drop is a share: 0 <= drop < 1")

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> Learnt:
        """Ranks first, then the combined ones are ranked again."""
        learnt = tuple(ranks(lambda: map(self._ordered, passes()), len(self.detectors)))
        n = share_of(self.drop, sum(len(scores["uid"]) for scores in passes()))
        last = nth_largest(lambda: (self._keys(scores, learnt) for scores in passes()), n) if n else 2**64
        return Learnt(learnt, last)

    def drops(self, scores: Scores, fitted: Learnt) -> np.ndarray:
        """bool[n]"""
        if fitted.last >= 2**64:
            return np.zeros(len(scores["uid"]), bool)
        return self._keys(scores, fitted.ranks) >= fitted.last

    def _ordered(self, scores: Scores) -> list[np.ndarray]:
        return [ordered(scores[column(scores, name)]) for name in self.detectors]

    def _keys(self, scores: Scores, learnt: Sequence[Ranks]) -> np.ndarray:
        p = np.stack([rank.p(values) for rank, values in zip(learnt, self._ordered(scores), strict=True)], axis=1)
        weights = self.weights or (1.0,) * len(self.detectors)
        return keys(combined(p, weights, self.combine), scores["uid"])


def combined(p: np.ndarray, weights: Sequence[float], combine: Combine) -> np.ndarray:
    """float[n], higher = more suspicious, of p-values float[n, detectors]."""
    share = np.asarray(weights, np.float64) / np.sum(weights)
    if combine == "min":
        return (np.log(share) - np.log(p)).max(axis=1)
    total = np.zeros(len(p))  # one detector after the other: a matrix product may round equal rows differently
    for values, weight in zip(p.T, share, strict=True):
        total -= weight * np.log(values)
    return total

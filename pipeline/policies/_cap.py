"""At most n of what is alike, exactly: of every group of pairs those with the smallest keys are kept.

Trade-off: memory holds a bucket of groups at a time, and of a shard no more than n + 1 pairs a group; what is left is a
row for each group that is too large, at most a pair in n + 1. Of a group that is in every shard a bucket holds n + 1
pairs a shard.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.buckets import Buckets, even
from pipeline.policies._select import Scores, column, keys, ties

Passes = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Limits:
    """Of every group with more than n pairs, ascending, the key of the first pair to be dropped."""

    groups: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Cap:
    """What `per_domain` and `caption_cap` share."""

    n: int
    detector: str = ""
    needs: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("n: at least 1 pair of each is kept")

    @property
    def detectors(self) -> tuple[str, ...]:
        """Whose scores it reads."""
        return (self.detector,) if self.detector else ()

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> Limits:
        """Where each group that is too large is cut."""
        return limits(lambda: ((scores[self.needs[0]], self._keys(scores)) for scores in passes()), self.n)

    def drops(self, scores: Scores, fitted: Limits) -> np.ndarray:
        """bool[n]"""
        groups = scores[self.needs[0]]
        if not len(fitted.groups):
            return np.zeros(len(groups), bool)
        at = np.minimum(np.searchsorted(fitted.groups, groups), len(fitted.groups) - 1)
        return (fitted.groups[at] == groups) & (self._keys(scores) >= fitted.first[at])

    def _keys(self, scores: Scores) -> np.ndarray:
        return keys(scores[column(scores, self.detector)], scores["uid"]) if self.detector else ties(scores["uid"])


def limits(passes: Passes, n: int) -> Limits:
    """Of (groups, keys), two uint64 arrays a shard, the (n+1)-th smallest key of every group that has one.

    Keys that are equal there are all dropped: never more than n are kept.
    """
    pairs = sum(len(groups) for groups, _ in passes())
    buckets = Buckets(even(pairs))
    for groups, ranked in passes():
        buckets.add(_smallest(np.stack([groups, ranked], axis=1), n))
    found = [_smallest(rows, n) for rows in buckets]
    last = np.concatenate([rows[_before(rows) == n] for rows in found])
    return Limits(last[:, 0], last[:, 1])


def _smallest(rows: np.ndarray, n: int) -> np.ndarray:
    """Of (group, key) uint64[m, 2] the n + 1 smallest keys of each group, sorted."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    return rows[_before(rows) <= n]


def _before(rows: np.ndarray) -> np.ndarray:
    """int[m]: how many pairs of the same group come before each; they are sorted."""
    at = np.arange(len(rows))
    begins = np.concatenate([[True], rows[1:, 0] != rows[:-1, 0]]) if len(rows) else np.empty(0, bool)
    return at - np.maximum.accumulate(np.where(begins, at, 0))

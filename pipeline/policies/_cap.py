"""At most n of what is alike, exactly: of every group of pairs those with the smallest keys are kept.

Trade-off: memory holds one slice of the groups at a time, which costs a pass over the sidecars a slice; what is left
of it is a row for each group that is too large, at most a pair in n + 1.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.draw import hash64
from pipeline.policies._select import column, ordered

Scores = Mapping[str, np.ndarray]
Passes = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
AT_ONCE = 8_000_000  # pairs of a slice, 16 bytes each


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

    def unscored(self, scores: Scores) -> np.ndarray:
        """bool[n]: pairs that the detector could not score."""
        if not self.detector:
            return np.zeros(len(scores["uid"]), bool)
        return np.isnan(scores[column(scores, self.detector)])

    def _keys(self, scores: Scores) -> np.ndarray:
        """Like (score, uid), by a hash of the uid: uids are data, and an attacker's might all begin alike."""
        tie = np.asarray([hash64(0, "cap", uid) >> 32 for uid in scores["uid"]], np.uint64)
        if not self.detector:
            return tie
        return ordered(scores[column(scores, self.detector)]) << np.uint64(32) | tie


def limits(passes: Passes, n: int) -> Limits:
    """Of (groups, keys), two uint64 arrays a shard, the (n+1)-th smallest key of every group that has one.

    Keys that are equal there are all dropped: never more than n are kept.
    """
    pairs = sum(len(groups) for groups, _ in passes())
    slices = max(1, -(-pairs // AT_ONCE))
    found = [_slice(passes, n, i, slices) for i in range(slices)]
    return Limits(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _slice(passes: Passes, n: int, i: int, of: int) -> tuple[np.ndarray, np.ndarray]:
    """The limits of the i-th of `of` equal ranges of group hashes."""
    held = _Held(n)
    for groups, keys in passes():
        here = (groups >> np.uint64(32)) * np.uint64(of) >> np.uint64(32) == i
        held.add(groups[here], keys[here])
    held.shrink()
    last = held.ranks() == n
    return held.groups[last], held.keys[last]


class _Held:
    """Pairs of a slice; of a group with many, now and then all but the n + 1 with the smallest keys are forgotten."""

    def __init__(self, n: int):
        self.n, self.room = n, AT_ONCE
        self.groups, self.keys = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, groups: np.ndarray, keys: np.ndarray) -> None:
        self.waiting.append((groups, keys))
        if len(self.groups) + sum(len(g) for g, _ in self.waiting) > self.room:
            self.shrink()
            self.room = 2 * max(AT_ONCE, len(self.groups))

    def shrink(self) -> None:
        self.groups = np.concatenate([self.groups, *(g for g, _ in self.waiting)])
        self.keys = np.concatenate([self.keys, *(k for _, k in self.waiting)])
        self.waiting = []
        order = np.lexsort((self.keys, self.groups))
        self.groups, self.keys = self.groups[order], self.keys[order]
        kept = self.ranks() <= self.n
        self.groups, self.keys = self.groups[kept], self.keys[kept]

    def ranks(self) -> np.ndarray:
        """int[m]: how many pairs of the same group come before each; they are sorted."""
        rows = np.arange(len(self.groups))
        begins = np.concatenate([[True], self.groups[1:] != self.groups[:-1]]) if len(rows) else np.empty(0, bool)
        return rows - np.maximum.accumulate(np.where(begins, rows, 0))

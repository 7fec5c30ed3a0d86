"""Remove a fixed share: the form in which filters are compared, because every arm then trains on as much data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.policies._select import Scores, column, keys, nth_largest, share_of


@dataclass(frozen=True)
class budget:
    """Drop the most suspicious share of all pairs, exactly; ties go by uid."""

    detector: str
    drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError("drop is a share: 0 <= drop < 1")

    @property
    def detectors(self) -> tuple[str, ...]:
        """Whose scores it reads."""
        return (self.detector,)

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> int:
        """The key of the last pair to be dropped."""
        pairs = sum(len(scores["uid"]) for scores in passes())
        n = share_of(self.drop, pairs)
        return nth_largest(lambda: map(self._keys, passes()), n) if n else 2**64

    def drops(self, scores: Scores, fitted: int) -> np.ndarray:
        """bool[n]"""
        return self._keys(scores) >= fitted if fitted < 2**64 else np.zeros(len(scores["uid"]), bool)

    def _keys(self, scores: Scores) -> np.ndarray:
        return keys(scores[column(scores, self.detector)], scores["uid"])

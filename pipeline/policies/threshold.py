"""Remove what scores above a fixed value: for a threshold that is known from elsewhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.policies._select import Scores, column


@dataclass(frozen=True)
class threshold:
    """Drop every pair whose score is above a value, and those without a score."""

    detector: str
    above: float

    @property
    def detectors(self) -> tuple[str, ...]:
        """Whose scores it reads."""
        return (self.detector,)

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> None:
        """Nothing to learn from the data."""

    def drops(self, scores: Scores, fitted: None) -> np.ndarray:
        """bool[n]"""
        return ~(scores[column(scores, self.detector)] <= self.above)

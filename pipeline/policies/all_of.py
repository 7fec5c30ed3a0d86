"""And: for a detector whose false alarms another one knows. Trade-off: a poison that escapes one part escapes all."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.policies._several import Scores, Several


@dataclass(frozen=True)
class all_of(Several):
    """Drop what every one of several policies drops."""

    def drops(self, scores: Scores, fitted: tuple[Any, ...]) -> np.ndarray:
        """bool[n]"""
        return np.all(self._each(scores, fitted), axis=0)

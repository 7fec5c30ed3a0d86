"""Or: for attacks of which each leaves another trace. Trade-off: the shares that the parts remove add up."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.policies._several import Scores, Several


@dataclass(frozen=True)
class any_of(Several):
    """Drop what at least one of several policies drops."""

    def drops(self, scores: Scores, fitted: tuple[Any, ...]) -> np.ndarray:
        """bool[n]"""
        return np.any(self._each(scores, fitted), axis=0)

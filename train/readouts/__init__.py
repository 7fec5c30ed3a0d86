"""Readouts: one file, one way to ask an image tower for a class, fitted on labelled clean images.

Trade-off: a readout hears only the image tower, so it says what a backdoor did there and nothing about the text tower;
zero-shot, which asks both, is in evaluate.py. `knn`, `prototypes` and `probe` share the same features and cost seconds;
`finetune` trains the tower itself and has an interface of its own (images, not features).
This module imports nothing heavy, so `mithridate evaluate --help` answers at once.
"""

from importlib import import_module
from typing import Literal, Protocol, cast, get_args

import numpy as np

ReadoutName = Literal["knn", "prototypes", "probe", "finetune"]
READOUTS: tuple[ReadoutName, ...] = get_args(ReadoutName)


class Readout(Protocol):
    """Higher scores are better; a class that the training part did not show scores -inf."""

    def fit(self, features: np.ndarray, labels: np.ndarray, classes: int) -> "Readout":
        """float32 [m, d] unit rows and int[m] in [0, classes) -> itself, fitted."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float32 [n, d] unit rows -> float [n, classes]."""


def readout(name: ReadoutName) -> Readout:
    """The readout over features of that name, not fitted."""
    return cast(Readout, getattr(import_module(f"train.readouts.{name}"), name)())

"""What a detector sees of a shard: columns joined by uid before the call."""

from dataclasses import dataclass, field

import numpy as np


def _absent() -> np.ndarray:
    return np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Batch:
    """n pairs. Columns that no detector of the run `needs` are empty.

    uid: str[n]. image_embedding, text_embedding: float32[n, d], not normalised. similarity_trace, loss_trace: float32
    [n, epochs], what training saw of the pair before the step that could memorise it. poisoned: bool[n], from a ledger.
    """

    uid: np.ndarray
    image_embedding: np.ndarray = field(default_factory=_absent)
    text_embedding: np.ndarray = field(default_factory=_absent)
    similarity_trace: np.ndarray = field(default_factory=_absent)
    loss_trace: np.ndarray = field(default_factory=_absent)
    poisoned: np.ndarray = field(default_factory=_absent)

    def __len__(self) -> int:
        return len(self.uid)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; a zero row stays NaN, which is the most suspicious score there is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

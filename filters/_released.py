"""The neighbours as the authors' released code looks them up: about half of them in the row before the right one.

It sorts distances from which a row's own were cut out, so that all items behind it moved up by one, and uses these
places in the matrix from which nothing was cut. Its k-th distance of a row is the (k + 1)-th of the others; that of a
neighbour counts its distance to itself, 0, as the first.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filters._batch import Batch
from filters._density import FLOOR, Of, columns, placed
from filters._knn import batch_neighbours

WORST = 1000.0  # what the authors put for NaN and infinity


@dataclass(frozen=True)
class Released:
    """The parameters of a released detector: references are the rest of the batch, in blocks of `size`."""

    k: int = 16
    of: Of = "image"
    size: int = 2048
    reference: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.k < self.size - 1:
            raise ValueError(f"k={self.k} must be at least 1, and less than size={self.size} less one")

    @property
    def needs(self) -> tuple[str, ...]:
        return columns(self.of)

    def looked_up(self, batch: Batch) -> "LookedUp":
        wanted = columns(self.of)
        distance, index = batch_neighbours(batch, wanted, self.size, self.k + 1)
        # for the neighbours' own distances only the row itself is left out, and not its pair
        theirs = batch_neighbours(batch, wanted, self.size, self.k, alone=True)[0] if self.of == "both" else distance
        at = placed(len(batch), self.size, len(wanted))
        place, pairs = index[at.row, : self.k] - at.first[:, None], at.pairs[:, None]
        column, item = place // pairs, place % pairs
        wrong = place - column - (item > (at.row - at.first)[:, None])
        return LookedUp(distance[at.row], wrong + at.first[:, None], theirs[:, : self.k])


@dataclass(frozen=True)
class LookedUp:
    """distance: float32[n, k + 1]; index: int64[n, k], where the released code looks; theirs: float32[m, k]."""

    distance: np.ndarray
    index: np.ndarray
    theirs: np.ndarray


def dimension(distance: np.ndarray, farthest: np.ndarray) -> np.ndarray:
    """The authors' estimate: of these distances [n, k], relative to the one after them [n, 1]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -distance.shape[1] / np.log(distance / farthest.astype(float) + FLOOR).sum(axis=1)


def cleaned(scores: np.ndarray, batch: Batch) -> np.ndarray:
    """NaN and infinities as the authors have them, but NaN where the pair has no usable image."""
    scores = np.nan_to_num(scores, nan=WORST, posinf=WORST, neginf=0.0)
    scores[~np.isfinite(batch.image_embedding).all(axis=1)] = np.nan
    return scores

"""What the density detectors share: the neighbourhood of a pair's image, and the dimension there.

References are a pool drawn from all shards, or, as in the paper, the other pairs of a batch: then a score depends on
the company that the pair is in.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from filters._batch import Batch
from filters._knn import batch_neighbours, blocks, neighbours, pool_distances

Of = Literal["image", "both"]
TINY = 1e-12  # k identical images have d_k = 0
FLOOR = 1e-4  # under the logarithm, as the authors have it


@dataclass(frozen=True)
class Density:
    """The parameters of a density detector, and what it looks at.

    k: neighbours. reference: rows of the pool, or of the batch in blocks of `size`. of: images, or images and texts.
    """

    k: int = 16
    reference: Literal["pool", "batch"] = "pool"
    of: Of = "image"
    size: int = 2048
    looks_back: ClassVar[bool] = False  # whether it asks for `theirs`

    def __post_init__(self) -> None:
        if self.k < 1 or (self.reference == "batch" and self.k >= self.size):
            raise ValueError(f"k={self.k} must be at least 1, and in a batch less than size={self.size}")

    @property
    def needs(self) -> tuple[str, ...]:
        return columns(self.of)

    @property
    def pools(self) -> tuple[str, ...]:
        return columns(self.of) if self.reference == "pool" else ()

    @property
    def within(self) -> dict[tuple[str, ...], int]:
        return {self.pools: self.k} if self.pools and self.looks_back else {}

    def near(self, batch: Batch, pool: Batch | None) -> tuple[np.ndarray, np.ndarray]:
        """Distances [n, k] and rows [n, k] of the pairs' images to their nearest references, nearest first."""
        if self.reference == "pool":
            assert pool is not None, "a detector with `pools` is given one"
            return neighbours(batch, pool, "image_embedding", self.k, among=columns(self.of))
        distance, index = batch_neighbours(batch, columns(self.of), self.size, self.k)
        rows = placed(len(batch), self.size, len(columns(self.of))).row
        return distance[rows], index[rows]

    def floor(self, theirs: np.ndarray) -> float:
        """The least k-distance that a pair is compared with: of a heap of copies it is 0, and a ratio to it endless.

        A thousandth of the references' median, so that a ratio ends where the authors' code cuts it off, at 1000.
        """
        usual = theirs[:, -1][np.isfinite(theirs[:, -1])]
        return max(float(np.median(usual)) / 1000, TINY) if len(usual) else TINY

    def theirs(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        """Distances [m, k] of the references to their own nearest."""
        if self.reference == "pool":
            assert pool is not None
            return pool_distances(pool, columns(self.of), self.k)
        return batch_neighbours(batch, columns(self.of), self.size, self.k)[0]


def columns(of: Of) -> tuple[str, ...]:
    return ("image_embedding", "text_embedding") if of == "both" else ("image_embedding",)


@dataclass(frozen=True)
class Placed:
    """Where the images of a batch are among the rows of its blocks: the row, its block's first row and its pairs."""

    row: np.ndarray
    first: np.ndarray
    pairs: np.ndarray


def placed(n: int, size: int, stacked: int) -> Placed:
    row, first, pairs = (np.empty(n, np.int64) for _ in range(3))
    offset = 0
    for begin, end in blocks(n, size):
        done = begin if begin % size == 0 else begin // size * size + size  # the last block looks back, but scores once
        row[done:end] = offset + np.arange(done - begin, end - begin)
        first[done:end], pairs[done:end] = offset, end - begin
        offset += stacked * (end - begin)
    return Placed(row, first, pairs)


def dimension(distance: np.ndarray) -> np.ndarray:
    """Local intrinsic dimension by maximum likelihood, float[n], from distances [n, k] to the nearest, nearest first.

    -k / sum of log(d_i / d_k + 1e-4), which neighbours that are all equally far would carry past infinity: at most 1e4.
    Of k identical rows it is 0.
    """
    k, farthest = distance.shape[1], distance[:, -1:]
    total = np.log(distance / np.maximum(farthest, TINY, dtype=np.float64) + FLOOR).sum(axis=1)
    return np.where(farthest[:, 0] == 0, 0, -k / np.minimum(total, -k * FLOOR))

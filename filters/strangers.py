"""Are the image's neighbours in the trained space strangers in pixel space?

Trade-off: a learnt trigger gathers images that have nothing else in common; so does a good concept, and on photographs
the neighbours of most clean images are strangers too. Best where likes look alike: drawings, products, near-duplicates.
The whole pool's distance is the yardstick, or plain images would be everybody's friend. The pool's pixels take 12 KB a
row: 200 MB at its default size.
Source: ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._knn import neighbours
from filters._learnt import learnt

COARSE = 16  # pixels a side that are compared


@dataclass(frozen=True)
class strangers:
    """RMS pixel distance to the k images nearest by embedding, as a share of that to the whole pool."""

    needs = ("image_embedding", "pixels")
    pools = needs
    k: int = 16

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        column = "image_embedding"
        index = neighbours(batch, pool, column, self.k, cosine=True)[1]
        own, theirs = _coarse(batch.pixels), learnt(pool, "coarse pixels", lambda: _coarse(pool.pixels))
        near = np.zeros(len(batch))
        for rank in range(self.k):  # n x k x pixels would be k times the batch
            near += ((own - theirs[index[:, rank]]) ** 2).sum(axis=1) / self.k
        centre = theirs.mean(axis=0)
        usual = ((own - centre) ** 2).sum(axis=1) + ((theirs - centre) ** 2).sum(axis=1).mean()
        with np.errstate(invalid="ignore", divide="ignore"):  # a pool of one picture: 0 / 0, there is no usual
            share = np.sqrt(near / usual)
        return np.where(batch.decoded & np.isfinite(batch.image_embedding).all(axis=1), share, np.nan)


def _coarse(pixels: np.ndarray) -> np.ndarray:
    """float32[n, COARSE * COARSE * 3]: means of square blocks."""
    block = pixels.shape[1] // COARSE
    # whole planes are added: numpy's own mean over both axes takes eight times as long
    rows = np.zeros((len(pixels), COARSE, pixels.shape[2], 3), np.uint16)
    means = np.zeros((len(pixels), COARSE, COARSE, 3), np.float32)
    for offset in range(block):
        rows += pixels[:, offset::block]
    for offset in range(block):
        means += rows[:, :, offset::block]
    means /= block * block
    return means.reshape(len(pixels), COARSE * COARSE * 3)

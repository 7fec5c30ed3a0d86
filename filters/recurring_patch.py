"""Does a small piece of the image recur, at the same place, in images that are otherwise different?

Trade-off: finds a patch that always sits at one place and covers a whole cell of 4 x 4 of the 64 x 64 pixels; one that
wanders, blends in or is smaller than a sixteenth of the image's side is not seen. A watermark or a template's frame is
the same thing to it. Cells with little contrast are left out: every white corner recurs. Copies of whole images recur
in most of their cells and are discounted by the median cell. One pass; counts are upper bounds (`filters/_sketch.py`),
of up to 256 additions an image.
Source: ours; trigger patches of Gu et al. 2017 (BadNets) as used on CLIP by Carlini & Terzis, ICLR 2022.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._sketch import count, mixed, sketch

CELL = 4  # pixels a side
LEVELS = 4  # of grey that a pixel is told apart by: an encoder's noise seldom moves a black or white one
FLAT = 64  # range of grey below which a cell has nothing to recognise


@dataclass(frozen=True)
class recurring_patch:
    """Images with the same content in one cell, for the most frequent cell, less that for the median cell."""

    needs = ("pixels", "decoded")

    def summarize(self, batch: Batch) -> np.ndarray:
        keys, flat = _cells(batch.pixels)
        return sketch(keys[~flat & batch.decoded[:, None]])

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one + other

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        keys, flat = _cells(batch.pixels)
        counts = np.where(flat, np.nan, count(summary, keys))
        scores = np.full(len(batch), np.nan)
        scores[batch.decoded] = 0  # of an image that is flat throughout nothing recurs
        some = batch.decoded & ~flat.all(axis=1)
        scores[some] = np.nanmax(counts[some], axis=1) - np.nanmedian(counts[some], axis=1)
        return scores


def _cells(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell of each image a key of place and content, and whether it is flat: [n, cells]."""
    side = pixels.shape[1] // CELL
    grey = (pixels @ np.asarray([77, 150, 29], np.uint16) >> 8).astype(np.uint8)  # Rec. 601 in 8 bits
    grey = grey.reshape(len(pixels), side, CELL, side, CELL).swapaxes(2, 3)
    grey = grey.reshape(len(pixels), side * side, CELL * CELL)
    content = np.zeros(grey.shape[:2], np.uint64)
    for pixel in range(CELL * CELL):
        content = content * np.uint64(LEVELS) + grey[:, :, pixel] // (256 // LEVELS)
    place = mixed(np.arange(1, 1 + side * side))
    return mixed(content ^ place), np.ptp(grey, axis=2) < FLAT

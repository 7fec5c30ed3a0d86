"""Does a small piece of the image recur, at the same place, in images that are otherwise different?

Trade-off: finds a patch that always sits at one place and covers a whole cell of the 64 x 64 pixels: 4 or 8 a side, so
an eighth of the image's side is enough anywhere and a sixteenth in a corner. One that wanders, blends in, or is so fine
that it is grey at that size is not seen; a watermark or a template's frame is the same thing to it. Edges recur by
chance at every place alike, so what counts is more than the content's share of all places. Cells with little contrast
are left out. In copies of whole images most cells recur, so the median cell is taken off; but an image that happens to
share one cell with a thousand copies looks patched: remove copies first. One pass, up to 640 additions an image to one
sketch (`filters/_sketch.py`), whose background is part of what is expected.
Source: ours; trigger patches of Gu et al. 2017 (BadNets) as used on CLIP by Carlini & Terzis, ICLR 2022.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._sketch import added, background, count, mixed, sketch

CELLS = (4, 8)  # pixels a side; the larger ones are halved
GRID = 4  # values a side that a cell is known by
LEVELS = 3  # of grey that a value is told apart by: an encoder's noise seldom moves a black or white one
FLAT = 64  # range of grey below which a cell has nothing to recognise


@dataclass(frozen=True)
class recurring_patch:
    """Images with the same content in one cell, in standard deviations above chance: the highest less the median."""

    needs = ("pixels", "decoded")

    def summarize(self, batch: Batch) -> np.ndarray:
        keys = []
        for side in CELLS:
            content, placed, flat = _cells(batch.pixels[batch.decoded], side)
            keys += [content[~flat], placed[~flat]]
        return sketch(np.concatenate(keys))

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return added(one, other)

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        above = []
        noise = background(summary)
        for side in CELLS:
            content, placed, flat = _cells(batch.pixels, side)
            expected = noise + np.maximum(count(summary, content) - noise, 0) / placed.shape[1]
            above.append(np.where(flat, np.nan, (count(summary, placed) - expected) / np.sqrt(expected + 1)))
        cells = np.concatenate(above, axis=1)
        cells[np.isnan(cells).all(axis=1)] = 0  # of an image that is flat throughout nothing recurs
        return np.where(batch.decoded, np.nanmax(cells, axis=1) - np.nanmedian(cells, axis=1), np.nan)


def _cells(pixels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each cell of each image a key of its content, one of content and place, and whether it is flat: [n, cells]."""
    row = pixels.shape[1] // side
    grey = pixels @ np.asarray([77, 150, 29], np.uint16) >> 8  # Rec. 601 in 8 bits
    grey = grey.reshape(len(pixels), row, GRID, side // GRID, row, GRID, side // GRID)
    grey = grey.sum(axis=(3, 6), dtype=np.uint16) // (side // GRID) ** 2
    grey = grey.swapaxes(2, 3).reshape(len(pixels), row * row, GRID * GRID)
    content = np.full(grey.shape[:2], side, np.uint64)
    for value in range(GRID * GRID):
        content = content * np.uint64(LEVELS) + grey[:, :, value] * LEVELS // 256
    content = mixed(content)
    place = mixed(np.arange(1, 1 + row * row))
    return content, mixed(content ^ place), np.ptp(grey, axis=2) < FLAT

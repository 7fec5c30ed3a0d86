"""What share of all pairs scores as high: scores of different detectors made comparable.

Trade-off: exact up to a hundredth of the share itself, so the tail, where decisions are made, is as fine as the rest;
three passes over the sidecars and at most some tens of megabytes a detector, however many pairs there are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FINENESS = 256  # cells a factor e of the share
TOP, STEP = 16, 8  # bits of a score that the first pass, and each further one, tells apart


@dataclass(frozen=True)
class Ranks:
    """Cells of scores, ascending: the lowest value of each (as `ordered` has it), and the share at or above that."""

    low: np.ndarray
    share: np.ndarray

    def p(self, values: np.ndarray) -> np.ndarray:
        """float[n]: the empirical p-value of each `ordered` score; of the highest ones the least."""
        return self.share[np.maximum(np.searchsorted(self.low, values, side="right") - 1, 0)]


def ranks(passes: Callable[[], Iterable[Sequence[np.ndarray]]], columns: int) -> list[Ranks]:
    """Of `ordered` scores, a list of `columns` arrays a shard. No pairs give no cells."""
    grids = [_Grid() for _ in range(columns)]
    for bits in (TOP, *[STEP] * ((32 - TOP) // STEP)):
        for grid in grids:
            grid.split(bits)
        for shard in passes():
            for grid, values in zip(grids, shard, strict=True):
                grid.add(values)
    return [grid.ranks() for grid in grids]


class _Grid:
    """Counts of cells that are split where they hold too large a part of all that is at or above them."""

    def __init__(self) -> None:
        self.low, self.size = np.zeros(1, np.uint64), np.full(1, 2**32, np.uint64)
        self.counts = np.zeros(1, np.int64)

    def split(self, bits: int) -> None:
        above = np.cumsum(self.counts[::-1])[::-1]
        coarse = ((self.counts * FINENESS > above) & (self.size > 1)) | (self.size == 2**32)
        parts = np.where(coarse, 2**bits, 1)
        size = self.size // parts.astype(np.uint64)
        within = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        self.low = np.repeat(self.low, parts) + within.astype(np.uint64) * np.repeat(size, parts)
        self.size = np.repeat(size, parts)
        self.counts = np.zeros(len(self.low), np.int64)

    def add(self, values: np.ndarray) -> None:
        at = np.searchsorted(self.low, values, side="right") - 1
        self.counts += np.bincount(at, minlength=len(self.low))

    def ranks(self) -> Ranks:
        there = self.counts > 0
        low, above = self.low[there], np.cumsum(self.counts[::-1])[::-1][there]
        label = np.floor(FINENESS * np.log(np.maximum(above, 1)))
        first = np.concatenate([[True], label[1:] != label[:-1]]) if len(low) else np.empty(0, bool)
        return Ranks(low[first], above[first] / max(int(self.counts.sum()), 1))

"""Rows in files on the local disk by the range of their first number, each small enough to be sorted in memory.

Trade-off: what does not fit into memory is written once and read once more, 16 bytes a row, instead of being read anew
for every range. Where everything fits nothing is written.
"""

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

AT_ONCE = 8_000_000  # rows of a bucket


class Buckets:
    """uint64[n, 2] in, and out again bucket by bucket, ascending by the first column; within one in no order."""

    def __init__(self, bounds: np.ndarray):
        """Bucket i has the rows with bounds[i - 1] <= first < bounds[i], both ends open."""
        self.bounds = np.asarray(bounds, np.uint64)
        files = len(bounds) + 1 if len(bounds) else 0
        self.files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(files)]  # noqa: SIM115  # closed when read
        self.rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        if not self.files:
            self.rows.append(rows)
            return
        bucket = np.searchsorted(self.bounds, rows[:, 0], side="right")
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(len(self.files) + 1))
        for number in np.unique(bucket):
            self.files[number].write(np.ascontiguousarray(rows[order[edges[number] : edges[number + 1]]]).data)

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self.files:
            yield np.concatenate([np.empty((0, 2), np.uint64), *self.rows])
        for file in self.files:
            file.seek(0)
            yield np.frombuffer(file.read(), np.uint64).reshape(-1, 2)
            file.close()


def even(rows: int) -> np.ndarray:
    """Bounds for so many rows whose first numbers are uniform, as hashes are."""
    buckets = max(1, -(-rows // AT_ONCE))
    return np.asarray([i * 2**64 // buckets for i in range(1, buckets)], np.uint64)


def by_sample(sample: np.ndarray, rows: int) -> np.ndarray:
    """Bounds for so many rows of which this uint64[m] is a sample; numbers that are all alike share a bucket."""
    buckets = max(1, -(-rows // AT_ONCE))
    ranks = np.arange(1, buckets) * len(sample) // buckets
    return np.unique(np.sort(sample)[ranks]) if len(sample) else np.empty(0, np.uint64)

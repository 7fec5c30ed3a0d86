"""Nearest neighbours: the one engine of all density and neighbour detectors.

Trade-off: no index. A block of queries against a pool of up to 100k rows is one matrix product and a top-k
(`filters/_search.py`) and needs no recall to be trusted. Beyond that, a pool may be drawn with `probes`
(`filters/_lists.py`): then a search misses some neighbours, and `recall` says how many. What one detector asked for is
remembered, with the batch, for the others. Where a task was given a GPU it searches there, and always the whole pool.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from filters._batch import Batch, unit
from filters._learnt import learnt
from filters._search import Found, Reference, search


class Search(NamedTuple):
    """Whose nearest are looked for among what: a column of the queries, and columns of the pool one below the other.

    Without a column, those of the pool's own rows.
    """

    column: str
    among: tuple[str, ...]
    cosine: bool = False

    def __str__(self) -> str:
        return f"{self.column} in {'+'.join(self.among)}{' by cosine' if self.cosine else ''}"


class InBlocks(NamedTuple):
    """The nearest of each row of a batch in its own block."""

    among: tuple[str, ...]
    size: int
    alone: bool


def neighbours(
    queries: Batch, pool: Batch, column: str, k: int, among: Sequence[str] = (), cosine: bool = False
) -> Found:
    """Euclidean distances float32[n, k] and pool rows int64[n, k] of the k nearest pool rows, nearest first.

    `among`: these columns of the pool instead of the same one, one below the other: row c * len(pool) + r is row r of
    the c-th. With `cosine`, all rows at length one. A pair in the pool with the query's own uid is not its neighbour.
    Queries with NaN get NaN distances. Raises ValueError where the pool has too few rows.
    """
    wanted = Search(column, tuple(among) or (column,), cosine)
    return _once(queries, wanted, pool, lambda k: _near(queries, pool, wanted, k), k)


def pool_distances(pool: Batch, columns: Sequence[str], k: int) -> np.ndarray:
    """Distances float32[m, k] of each row of the stacked pool to its k neighbours there."""
    everything = slice(0, len(pool) * len(columns))
    wanted = Search("", tuple(columns))
    return _once(pool, wanted, None, lambda k: near_within(pool, columns, k, everything), k)[0]


def near_within(pool: Batch, columns: Sequence[str], k: int, part: slice) -> Found:
    """The same of these rows of the stacked pool, not remembered; and which rows the neighbours are."""
    own = _pairs(len(pool), len(columns))[part]
    reference = _reference(pool, tuple(columns))
    rows = _below([getattr(pool, name) for name in columns])
    whole = part.start == 0 and part.stop == len(rows)
    return search(rows if whole else rows[part], reference, own, k)


def batch_neighbours(batch: Batch, columns: Sequence[str], size: int, k: int, alone: bool = False) -> Found:
    """The k nearest of each reference row of a batch in its own block, as laid out by `blocks`, blocks in order.

    The indices are into the same rows. A pair is not its own neighbour in any column; if `alone`, a row is not, but
    the other embedding of its pair may be.
    """
    parts = [getattr(batch, name) for name in columns]

    def find(k: int) -> Found:
        distances, indices = [np.empty((0, k), np.float32)], [np.empty((0, k), np.int64)]
        offset = 0
        for first, last in blocks(len(batch), size):
            rows = _below([part[first:last] for part in parts])
            own = np.arange(len(rows))[:, None] if alone else _pairs(last - first, len(parts))
            distance, index = search(rows, Reference.of(rows), own, k)
            distances.append(distance)
            indices.append(index + offset)
            offset += len(rows)
        return np.concatenate(distances), np.concatenate(indices)

    return _once(batch, InBlocks(tuple(columns), size, alone), None, find, k)


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """First and last + 1 of each block of n rows: `size` in order; where the last is short, the last `size` rows."""
    return [(max(0, min(start, n - size)), min(start + size, n)) for start in range(0, n, size)]


def recall(queries: Batch, pool: Batch, rows: np.ndarray, wanted: Search) -> tuple[int, int]:
    """How many of the neighbours of these rows were found by a search in the pool, and of how many."""
    distance, index = searches(queries, pool)[wanted]
    truth, nearest = _near(queries.take(rows), pool, wanted, index.shape[1], exact=True)
    known = np.isfinite(truth).all(axis=1)
    # by distance: of rows that are equally far any is right
    hits = int((distance[rows][known] <= truth[known][:, -1:] * (1 + 1e-5)).sum())
    return hits, nearest[known].size


def searches(queries: Batch, pool: Batch) -> dict[Search, Found]:
    """What was found for these rows in this pool."""
    return {wanted: (distance, index) for wanted, (where, distance, index, _) in queries.found.items() if where is pool}


def remember(
    queries: Batch, pool: Batch | None, found: dict[Search, Found], took: Mapping[Search, Sequence[float]] | None = None
) -> None:
    """What was found elsewhere for these very rows in this pool; None: for the rows of a pool in itself.

    `took`: what each search had cost, as of `clock`.
    """
    for wanted, (distance, index) in found.items():
        queries.found[wanted] = (pool, distance, index, np.asarray((took or {}).get(wanted, (0.0, 0.0))))


def clock() -> np.ndarray:
    """float[2]: seconds by the clock, and of all cores that this process used."""
    return np.array([time.perf_counter(), time.process_time()])


def cost(batch: Batch, searches: Iterable[Hashable]) -> np.ndarray:
    """What these searches for the rows of a batch took, as of `clock`; of one that was not made, nothing."""
    return np.sum([np.zeros(2), *(batch.found[what][3] for what in searches if what in batch.found)], axis=0)


def _near(queries: Batch, pool: Batch, wanted: Search, k: int, exact: bool = False) -> Found:
    rows, (_, columns, cosine) = getattr(queries, wanted.column), wanted
    at = {uid: row for row, uid in enumerate(pool.uid)}
    own = np.asarray([at.get(uid, -1) for uid in queries.uid], np.int64)[:, None]
    own = np.where(own < 0, -1, own + len(pool) * np.arange(len(columns)))
    return search(unit(rows) if cosine else rows, _reference(pool, columns, cosine), own, k, exact)


def _reference(pool: Batch, columns: tuple[str, ...], cosine: bool = False) -> Reference:
    """The pool as a search wants it; with lists, kept for the next shard, whose pool is the same in other memory."""

    def make() -> Reference:
        rows = _below([getattr(pool, name) for name in columns])
        return Reference.of(unit(rows) if cosine else rows, distinct=True, probes=pool.drawn.probes)

    # lists take minutes to make; without them there is nothing to keep but a copy of the pool
    return learnt(pool, ("reference", columns, cosine), make) if pool.drawn.probes else make()


def _pairs(n: int, columns: int) -> np.ndarray:
    return np.tile(np.arange(n), columns)[:, None] + n * np.arange(columns)


def _below(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _once(batch: Batch, what: Search | InBlocks, pool: Batch | None, find: Callable[[int], Found], k: int) -> Found:
    """find(k), remembered with the batch; what was found for a larger k serves a smaller one.

    The largest k of the run is found at once, so that no detector's search is made again for the next one.
    """
    known = batch.found.get(what)
    batch.asked.add(what)
    if known is None or known[0] is not pool or known[1].shape[1] < k:
        wanted, begin = max(k, (pool or batch).drawn.k), clock()
        try:
            distance, index = find(wanted)
        except ValueError:  # too few rows for another detector, but perhaps not for this one
            if wanted == k:
                raise
            distance, index = find(k)
        known = batch.found[what] = (pool, distance, index, clock() - begin)
    return known[1][:, :k], known[2][:, :k]

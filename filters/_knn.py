"""Nearest neighbours: the one engine of all density and neighbour detectors.

Trade-off: no index. A block of queries against a pool of up to 100k rows is one matrix product and a top-k and needs no
recall to be trusted. Beyond that, a pool may be drawn with `probes` (`filters/_lists.py`): then a search misses some
neighbours, and `recall` says how many. What one detector asked for is remembered, with the batch, for the others. Where
a task was given a GPU it searches there, and always the whole pool.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from filters._batch import Batch, Drawn, unit
from filters._lists import Lists, by_lists, greatest, make_lists

QUERIES = 2048  # at a time
QUERIES_OF_LISTS = 16384  # the more at a time, the larger the product of a list with those that look at it
CHUNK = 4096  # reference rows at a time, so that a product is still in the cache when it is searched
GPU_CHUNK = 65536
STRIP = 256
CANCELS = 0.05  # |x - y|^2 below this share of |x|^2 + |y|^2 is computed by differences: the expansion has lost digits
DIFFERENCES = 32768  # pairs at a time
KEPT = 8  # references with lists, which take minutes to make

Found = tuple[np.ndarray, np.ndarray]
Find = Callable[[np.ndarray, np.ndarray, int], Found]
_references: dict[tuple[Drawn, tuple[str, ...], bool], "Reference"] = {}


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


@dataclass(frozen=True)
class Reference:
    """Rows less their mean `centre`, ready to be searched: y float32[m, d], zeros where a row has NaN (not `usable`).

    With `lists`, y, squares and usable are in the order of the lists.
    """

    rows: np.ndarray
    centre: np.ndarray
    y: np.ndarray
    squares: np.ndarray
    usable: np.ndarray
    lists: Lists | None = None

    @classmethod
    def of(cls, rows: np.ndarray, probes: int = 0) -> "Reference":
        centre = _centre(rows)
        y, squares, usable = _finite(rows, centre)
        if not probes or has_gpu():  # which searches all of them in less time than lists take to make
            return cls(rows, centre, y, squares, usable)
        lists = make_lists(y, usable, probes)
        return cls(rows, centre, y[lists.order], squares[lists.order], usable[lists.order], lists)

    @property
    def half(self) -> np.ndarray:
        return np.where(self.usable, self.squares / 2, np.inf).astype(np.float32)

    def find(self) -> Find:
        """The search for the k rows of greatest closeness x.y - |y|^2 / 2, which are the nearest, in no order."""
        if has_gpu():
            return by_torch(self.y, self.half, "cuda")
        exact = by_numpy(self.y, self.half)
        return by_lists(self.y, self.half, self.lists, exact) if self.lists else exact

    def named(self, index: np.ndarray) -> np.ndarray:
        """Rows of y -> rows as they were given."""
        return self.lists.order[index] if self.lists else index

    def placed(self, index: np.ndarray) -> np.ndarray:
        """Rows as they were given, or -1 -> rows of y."""
        return np.where(index < 0, -1, self.lists.place[index]) if self.lists else index


def search(rows: np.ndarray, reference: Reference, own: np.ndarray, k: int, exact: bool = False) -> Found:
    """Distances float32[n, k] and reference rows int64[n, k] of each row's k nearest, nearest first.

    own: int64[n, e], reference rows that are no neighbours of the row (-1: none). Rows of the reference with NaN are
    nobody's neighbours; rows with NaN get NaN distances. `exact`: look into all lists. Raises ValueError where too few
    rows are left.
    """
    distance, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    if not len(rows):
        return distance, index
    y, squares, usable = reference.y, reference.squares, reference.usable
    needed = k + own.shape[1]
    if usable.sum() < needed:
        raise ValueError(f"k={k} neighbours need {needed} or more usable reference rows; there are {usable.sum()}")
    find = by_numpy(y, reference.half) if exact else reference.find()
    own = reference.placed(own)
    step = QUERIES_OF_LISTS if reference.lists and not exact else QUERIES
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        itself = len(rows) <= QUERIES and rows is reference.rows and not reference.lists
        x, norms, good = (y, squares, usable) if itself else _finite(rows[part], reference.centre)
        closeness, found = find(x, own[part], k)
        squared = norms[:, None] - 2 * closeness
        # the expansion loses the digits of what is small beside its terms
        row, rank = np.nonzero(squared < CANCELS * (norms[:, None] + squares[found]))
        for first in range(0, len(row), DIFFERENCES):
            at = row[first : first + DIFFERENCES], rank[first : first + DIFFERENCES]
            squared[at] = np.square(x[at[0]] - y[found[at]]).sum(axis=1)
        squared[~good] = np.nan
        order = np.argsort(squared, axis=1, kind="stable")
        distance[part] = np.sqrt(np.take_along_axis(squared, order, 1))
        index[part] = reference.named(np.take_along_axis(found, order, 1))
    return distance, index


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
    return {wanted: (distance, index) for wanted, (where, distance, index) in queries.found.items() if where is pool}


def remember(queries: Batch, pool: Batch, found: dict[Search, Found]) -> None:
    """What an earlier run found for these very rows in this pool."""
    for wanted, (distance, index) in found.items():
        queries.found[wanted] = (pool, distance, index)


def _near(queries: Batch, pool: Batch, wanted: Search, k: int, exact: bool = False) -> Found:
    rows, (_, columns, cosine) = getattr(queries, wanted.column), wanted
    at = {uid: row for row, uid in enumerate(pool.uid)}
    own = np.asarray([at.get(uid, -1) for uid in queries.uid], np.int64)[:, None]
    own = np.where(own < 0, -1, own + len(pool) * np.arange(len(columns)))
    return search(unit(rows) if cosine else rows, _reference(pool, columns, cosine), own, k, exact)


def _reference(pool: Batch, columns: tuple[str, ...], cosine: bool = False) -> Reference:
    """The pool as a search wants it; with lists, kept for the next shard, whose pool is the same in other memory."""
    key = (pool.drawn, columns, cosine)
    made = _references.pop(key, None)
    if made is None:
        rows = _below([getattr(pool, name) for name in columns])
        made = Reference.of(unit(rows) if cosine else rows, pool.drawn.probes)
    if pool.drawn.digests and made.lists:
        _references[key] = made  # the last used is the last to go
        while len(_references) > KEPT:
            _references.pop(next(iter(_references)))
    return made


def most(wanted: Iterable[dict[tuple[str, ...], int]]) -> dict[tuple[str, ...], int]:
    """Of what several detectors want `within` the pool, by columns the greatest k."""
    greatest_k: dict[tuple[str, ...], int] = {}
    for part in wanted:
        for columns, k in part.items():
            greatest_k[columns] = max(k, greatest_k.get(columns, 0))
    return greatest_k


def _pairs(n: int, columns: int) -> np.ndarray:
    return np.tile(np.arange(n), columns)[:, None] + n * np.arange(columns)


def _below(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _once(batch: Batch, what: Search | InBlocks, pool: Batch | None, find: Callable[[int], Found], k: int) -> Found:
    """find(k), remembered with the batch; what was found for a larger k serves a smaller one.

    The largest k of the run is found at once, and in every shard: which of several rows that are equally far are found
    may hang on k.
    """
    known = batch.found.get(what)
    if known is None or known[0] is not pool or known[1].shape[1] < k:
        wanted = max(k, (pool or batch).drawn.k)
        try:
            known = (pool, *find(wanted))
        except ValueError:  # too few rows for another detector, but perhaps not for this one
            if wanted == k:
                raise
            known = (pool, *find(k))
        batch.found[what] = known
    return known[1][:, :k], known[2][:, :k]


def _centre(rows: np.ndarray) -> np.ndarray:
    """Mean of the rows without NaN. Embeddings lie in a narrow cone; less their mean, small distances keep digits."""
    total = rows.sum(axis=0)
    if not np.isfinite(total).all():
        rows = rows[np.isfinite(rows).all(axis=1)]
        total = rows.sum(axis=0)
    return np.asarray(total / max(len(rows), 1), np.float32)


def _finite(rows: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows less the centre, or zeros for those that have NaN; their squared norms; and which were finite."""
    rows = np.subtract(rows, centre, dtype=np.float32)
    squares = np.einsum("nd,nd->n", rows, rows)
    good = np.isfinite(squares)
    if not good.all():
        rows, squares = np.where(good[:, None], rows, np.float32(0)), np.where(good, squares, np.float32(0))
    return rows, squares, good


def by_numpy(y: np.ndarray, half: np.ndarray) -> Find:
    """Block by block: a product, and the k greatest of it."""
    buffer = np.empty(QUERIES * min(CHUNK, len(y)), np.float32)  # new memory for every product would cost a tenth of it

    def find(x: np.ndarray, own: np.ndarray, k: int) -> Found:
        values, columns = [], []
        for start in range(0, len(y), CHUNK):
            chunk = y[start : start + CHUNK]
            closeness = buffer[: len(x) * len(chunk)].reshape(len(x), len(chunk))
            if x is y:
                _gram(x, closeness)
            else:
                np.matmul(x, chunk.T, out=closeness)
            closeness -= half[start : start + CHUNK]
            for column in own.T:
                (row,) = np.nonzero((column >= start) & (column < start + len(chunk)))
                closeness[row, column[row] - start] = -np.inf
            value, at = greatest(closeness, min(k, len(chunk)))
            values.append(value)
            columns.append(at + start)
        value, at = np.concatenate(values, axis=1), np.concatenate(columns, axis=1)
        best = np.argpartition(value, -k, axis=1)[:, -k:]
        return np.take_along_axis(value, best, 1), np.take_along_axis(at, best, 1)

    return find


def _gram(x: np.ndarray, out: np.ndarray) -> None:
    """x x^T for little more than half the price: the strips below the diagonal are those above it."""
    for start in range(0, len(x), STRIP):
        end = start + STRIP
        np.matmul(x[start:end], x[start:].T, out=out[start:end, start:])
        out[end:, start:end] = out[start:end, end:].T


def has_gpu() -> bool:
    """Without a driver torch is not even imported, which is slow and large."""
    if not Path("/proc/driver/nvidia").exists():
        return False
    import torch

    return torch.cuda.is_available()


def by_torch(y: np.ndarray, half: np.ndarray, device: str) -> Find:
    """The same search on a GPU."""
    import torch

    there, halves = torch.from_numpy(y).to(device), torch.from_numpy(half).to(device)

    def find(x: np.ndarray, own: np.ndarray, k: int) -> Found:
        rows, excluded = torch.from_numpy(x).to(device), torch.from_numpy(own).to(device)
        values, columns = [], []
        for start in range(0, len(there), GPU_CHUNK):
            chunk = there[start : start + GPU_CHUNK]
            closeness = rows @ chunk.T - halves[start : start + GPU_CHUNK]
            for column in excluded.T:
                row = ((column >= start) & (column < start + len(chunk))).nonzero()[:, 0]
                closeness[row, column[row] - start] = -torch.inf
            value, at = closeness.topk(min(k, len(chunk)), sorted=False)
            values.append(value)
            columns.append(at + start)
        value, best = torch.cat(values, dim=1).topk(k, sorted=False)
        return value.cpu().numpy(), torch.cat(columns, dim=1).gather(1, best).cpu().numpy()

    return find

"""Exact nearest neighbours: the one engine of all density and neighbour detectors.

Trade-off: no index. A block of queries against a pool of up to 100k rows is one matrix product and a top-k, needs no
recall to be trusted, and gives the same answer on every machine. What one detector asked for is remembered for the
others of the run.
"""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from filters._batch import Batch, unit

QUERIES = 2048  # at a time
CHUNK = 4096  # reference rows at a time, so that a product is still in the cache when it is searched
GPU_CHUNK = 65536
STRIP = 256
CANCELS = 0.05  # |x - y|^2 below this share of |x|^2 + |y|^2 is computed by differences: the expansion has lost digits
DIFFERENCES = 32768  # pairs at a time
POOLS = 4  # whose own distances are kept

Found = tuple[np.ndarray, np.ndarray]
_remembered: dict[tuple[Any, ...], tuple[list[weakref.ref[np.ndarray]], int, Any]] = {}
_largest: dict[tuple[Any, ...], int] = {}
_pools: dict[tuple[str, int], np.ndarray] = {}


def neighbours(
    queries: Batch, pool: Batch, column: str, k: int, among: Sequence[str] = (), cosine: bool = False
) -> Found:
    """Euclidean distances float32[n, k] and pool rows int64[n, k] of the k nearest pool rows, nearest first.

    `among`: these columns of the pool instead of the same one, one below the other: row c * len(pool) + r is row r of
    the c-th. With `cosine`, all rows at length one. A pair in the pool with the query's own uid is not its neighbour.
    Queries with NaN get NaN distances. Raises ValueError where the pool has too few rows.
    """
    rows, parts = getattr(queries, column), [getattr(pool, name) for name in among or (column,)]

    def find(k: int) -> Found:
        at = {uid: row for row, uid in enumerate(pool.uid)}
        own = np.asarray([at.get(uid, -1) for uid in queries.uid], np.int64)[:, None]
        own = np.where(own < 0, -1, own + len(pool) * np.arange(len(parts)))
        scaled, reference = (unit(x) if cosine else x for x in (rows, _below(parts)))
        return search(scaled, reference, own, k)

    return _once((rows, queries.uid, *parts), ("pool", cosine), find, k)


def pool_distances(pool: Batch, columns: Sequence[str], k: int) -> np.ndarray:
    """Distances float32[m, k] of each row of the stacked pool to its k neighbours there; computed once a process.

    Remembered by content, since each task is handed the same pool as other objects.
    """
    parts = [getattr(pool, name) for name in columns]
    name = (_once(parts, ("digest",), lambda _: _digest(parts), 0), len(parts))
    if name not in _pools or _pools[name].shape[1] < k:
        while len(_pools) >= POOLS:
            _pools.pop(next(iter(_pools)))
        _pools[name] = search(_below(parts), _below(parts), _pairs(len(pool), len(parts)), k)[0]
    return _pools[name][:, :k]


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
            distance, index = search(rows, rows, own, k)
            distances.append(distance)
            indices.append(index + offset)
            offset += len(rows)
        return np.concatenate(distances), np.concatenate(indices)

    return _once(parts, ("batch", size, alone), find, k)


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """First and last + 1 of each block of n rows: `size` in order; where the last is short, the last `size` rows."""
    return [(max(0, min(start, n - size)), min(start + size, n)) for start in range(0, n, size)]


def _pairs(n: int, columns: int) -> np.ndarray:
    return np.tile(np.arange(n), columns)[:, None] + n * np.arange(columns)


def _below(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _digest(parts: Sequence[np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(np.ascontiguousarray(part).data)
    return sha256.hexdigest()


def _once(arrays: Sequence[np.ndarray], what: tuple[Any, ...], find: Callable[[int], Any], k: int) -> Any:
    """find(k), remembered as long as these very arrays live; what was found for a larger k serves a smaller one.

    A k that was asked for before is found at once: of slof(k=16) and lid(k=64), only the first shard is searched twice.
    """
    for dead in [key for key, (refs, _, _) in _remembered.items() if any(ref() is None for ref in refs)]:
        del _remembered[dead]
    key = (*what, *map(id, arrays))
    if key not in _remembered or _remembered[key][1] < k:
        wanted = max(k, _largest.get(what, 0))
        try:
            found = find(wanted)
        except ValueError:  # too few rows for another detector, but perhaps not for this one
            if wanted == k:
                raise
            wanted, found = k, find(k)
        _remembered[key] = ([weakref.ref(a) for a in arrays], wanted, found)
        _largest[what] = max(wanted, _largest.get(what, 0))
    found = _remembered[key][2]
    return (found[0][:, :k], found[1][:, :k]) if isinstance(found, tuple) else found


def search(rows: np.ndarray, reference: np.ndarray, own: np.ndarray, k: int) -> Found:
    """Distances float32[n, k] and reference rows int64[n, k] of each row's k nearest, nearest first.

    own: int64[n, e], reference rows that are no neighbours of the row (-1: none). Rows of the reference with NaN are
    nobody's neighbours; rows with NaN get NaN distances. Raises ValueError where too few rows are left.
    """
    distance, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    if not len(rows):
        return distance, index
    centre = _centre(reference)
    y, squares, usable = _finite(reference, centre)
    needed = k + own.shape[1]
    if usable.sum() < needed:
        raise ValueError(f"k={k} neighbours need {needed} or more usable reference rows; there are {usable.sum()}")
    half = np.where(usable, squares / 2, np.inf).astype(np.float32)
    find = by_torch(y, half, "cuda") if has_gpu() else by_numpy(y, half)
    for start in range(0, len(rows), QUERIES):
        part = slice(start, start + QUERIES)
        x, norms, good = (
            (y, squares, usable) if len(rows) <= QUERIES and rows is reference else _finite(rows[part], centre)
        )
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
        index[part] = np.take_along_axis(found, order, 1)
    return distance, index


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


def by_numpy(y: np.ndarray, half: np.ndarray) -> Callable[[np.ndarray, np.ndarray, int], Found]:
    """A search for the k reference rows of greatest closeness x.y - |y|^2 / 2, which are the nearest, in no order."""
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
            value, at = _greatest(closeness, min(k, len(chunk)))
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


def _greatest(values: np.ndarray, k: int) -> Found:
    """The k greatest of each row and their columns, in no order.

    They are in the k groups of columns with the greatest maxima; only those are partitioned.
    """
    n, m = values.shape
    size = int((m / k) ** 0.5)
    groups = m // size
    top = np.argpartition(values[:, : size * groups].reshape(n, size, groups).max(axis=1), -k, axis=1)[:, -k:]
    columns = (top[:, None, :] + groups * np.arange(size)[:, None]).reshape(n, size * k)
    if size * groups < m:
        columns = np.hstack([columns, np.broadcast_to(np.arange(size * groups, m), (n, m - size * groups))])
    candidates = np.take(values, columns + m * np.arange(n)[:, None])
    best = np.argpartition(candidates, -k, axis=1)[:, -k:]
    return np.take_along_axis(candidates, best, 1), np.take_along_axis(columns, best, 1)


def has_gpu() -> bool:
    """Without a driver torch is not even imported, which is slow and large."""
    if not Path("/proc/driver/nvidia").exists():
        return False
    import torch

    return torch.cuda.is_available()


def by_torch(y: np.ndarray, half: np.ndarray, device: str) -> Callable[[np.ndarray, np.ndarray, int], Found]:
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

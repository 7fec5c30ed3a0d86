"""Exact nearest neighbours in a pool: the one engine of all density and neighbour detectors.

Trade-off: no index. A block of queries against a pool of up to 100k rows is one matrix product (0.1 G dot products a
second and core), needs no recall to be trusted, and gives the same answer on every machine.
"""

import hashlib

import numpy as np

from filters._batch import Batch

BLOCK = 2048  # queries at a time
_POOL_DISTANCES: dict[tuple[str, str, int], np.ndarray] = {}


def neighbours(queries: Batch, pool: Batch, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances float32[n, k] and pool rows int64[n, k] of the k nearest pool rows, nearest first.

    A row of the pool with the query's own uid is not its neighbour. Queries with NaN get NaN distances. Raises
    ValueError where the pool has fewer than k + 1 rows.
    """
    rows, reference = getattr(queries, column), getattr(pool, column)
    if len(reference) <= k:
        raise ValueError(f"k={k} neighbours need a pool of more than {k} rows, this one has {len(reference)}")
    distance, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), BLOCK):  # bounds the n x k x d differences below
        part = slice(start, start + BLOCK)
        distance[part], index[part] = _block(queries.uid[part], rows[part], pool.uid, reference, k)
    return distance, index


def _block(
    uid: np.ndarray, rows: np.ndarray, pool_uid: np.ndarray, reference: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    good = np.isfinite(rows).all(axis=1)
    candidates = np.zeros((len(rows), k + 1), np.int64)
    if good.any():
        _, candidates[good] = faiss.knn(np.ascontiguousarray(rows[good]), np.ascontiguousarray(reference), k + 1)
    own = pool_uid[candidates] == uid[:, None]
    # the k + 1 candidates less the query itself, or else less the farthest
    own[~own.any(axis=1), -1] = True
    own[~good] = np.arange(k + 1) == k
    index = candidates[~own].reshape(len(rows), k)
    # faiss expands |x - y|^2, which cancels for near-duplicates; k differences a row cost little
    distance = np.linalg.norm(reference[index] - rows[:, None], axis=2)
    order = np.argsort(distance, axis=1, kind="stable")
    distance, index = np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)
    distance[~good] = np.nan
    return distance, index


def pool_distances(pool: Batch, column: str, k: int) -> np.ndarray:
    """Distance float32[m] of each pool row to its k-th neighbour in the pool; computed once a process."""
    rows = np.ascontiguousarray(getattr(pool, column))
    key = (hashlib.sha256(rows.tobytes()).hexdigest(), column, k)
    if key not in _POOL_DISTANCES:
        _POOL_DISTANCES.clear()
        _POOL_DISTANCES[key] = neighbours(pool, pool, column, k)[0][:, -1]
    return _POOL_DISTANCES[key]

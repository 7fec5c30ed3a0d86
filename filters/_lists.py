"""Inverted lists: a search of a few heaps of a large pool, each by one exact product (IVF; Sivic & Zisserman 2003).

Trade-off: a neighbour in a list that was not looked at is missed; the distances to those that are found are exact,
since nothing is compressed. A pool of m rows has about 2 sqrt(m) lists: with 32 probes a million rows cost what 18,000
do. To make them takes a worker as long as to search some thousand rows exactly, so they do not pay below 100,000 rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ASSIGNED = 4096  # rows at a time
ITERATIONS = 6
TRAINED = 64  # rows a list that the centroids are made of

Found = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Lists:
    """List l has the rows order[start[l]:start[l + 1]] of the pool; `place` is the inverse of `order`."""

    centroids: np.ndarray
    start: np.ndarray
    order: np.ndarray
    place: np.ndarray
    probes: int


def make_lists(y: np.ndarray, probes: int) -> Lists:
    """Of rows y float32[m, d]."""
    import faiss

    count = max(1, min(2 * int(len(y) ** 0.5), len(y) // TRAINED))
    means = faiss.Kmeans(y.shape[1], count, niter=ITERATIONS, seed=0, max_points_per_centroid=TRAINED)
    means.train(y)
    centroids = np.asarray(means.centroids, np.float32)
    parts = [y[first : first + ASSIGNED] for first in range(0, len(y), ASSIGNED)]
    assigned = np.concatenate([_closeness(part, centroids).argmax(axis=1) for part in parts])
    order = np.argsort(assigned, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    start = np.concatenate([[0], np.cumsum(np.bincount(assigned, minlength=count))])
    return Lists(centroids, start, order, place, min(probes, count))


def by_lists(
    y: np.ndarray, half: np.ndarray, lists: Lists, everywhere: Callable[[np.ndarray, int], Found]
) -> Callable[[np.ndarray, int], Found]:
    """Find among y, in the order of the lists; `everywhere` for rows whose lists hold fewer than k."""

    def find(x: np.ndarray, k: int) -> Found:
        n, probes = len(x), lists.probes
        probed = np.argpartition(_closeness(x, lists.centroids), -probes, axis=1)[:, -probes:]
        values = np.full((n, probes, k), -np.inf, np.float32)
        places = np.zeros((n, probes, k), np.int64)
        visits = np.argsort(probed, axis=None, kind="stable")  # by list; a visit is row * probes + probe
        edges = np.searchsorted(probed.ravel()[visits], np.arange(len(lists.start)))
        for number in np.unique(probed):
            row, probe = np.divmod(visits[edges[number] : edges[number + 1]], probes)
            first, last = lists.start[number], lists.start[number + 1]
            if last == first:
                continue
            closeness = x[row] @ y[first:last].T
            closeness -= half[first:last]
            most = min(k, last - first)
            best, where = greatest(closeness, most)
            values[row, probe, :most], places[row, probe, :most] = best, where + first
        value, at = best_of(values.reshape(n, -1), places.reshape(n, -1), k)
        short = np.flatnonzero(np.isneginf(value).any(axis=1))
        for first in range(0, len(short), ASSIGNED // 2):
            rows = short[first : first + ASSIGNED // 2]
            value[rows], at[rows] = everywhere(x[rows], k)
        return value, at

    return find


def greatest(values: np.ndarray, k: int) -> Found:
    """The k greatest of each row and their columns, in no order.

    They are in the k groups of columns with the greatest maxima; only those are partitioned.
    """
    n, m = values.shape
    size = max(1, int((m / (2 * k)) ** 0.5))  # a candidate costs about twice as much as a group
    groups = m // size
    top = np.argpartition(values[:, : size * groups].reshape(n, size, groups).max(axis=1), -k, axis=1)[:, -k:]
    columns = (top[:, None, :] + groups * np.arange(size)[:, None]).reshape(n, size * k)
    if size * groups < m:
        columns = np.hstack([columns, np.broadcast_to(np.arange(size * groups, m), (n, m - size * groups))])
    return best_of(np.take(values, columns + m * np.arange(n)[:, None]), columns, k)


def best_of(values: np.ndarray, columns: np.ndarray, k: int) -> Found:
    """The k greatest of each row of candidates, and the columns that go with them, in no order."""
    best = np.argpartition(values, -k, axis=1)[:, -k:]
    return np.take_along_axis(values, best, 1), np.take_along_axis(columns, best, 1)


def _closeness(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return x @ centroids.T - np.square(centroids).sum(axis=1) / 2

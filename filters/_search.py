"""The search itself: the k greatest of a product, block by block, and what makes its answer a function of the rows.

Trade-off: rows that are equal (a caption that many pairs have) are one row of the product and are told apart
afterwards, by their place in the reference; so which of them are found hangs neither on k nor on the company of the
query, and repetition makes a search faster. Rows that differ but are equally far, which is rare, are as the machine
rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from filters._lists import Found, Lists, best_of, by_lists, greatest, make_lists

QUERIES = 2048  # at a time
QUERIES_OF_LISTS = 16384  # the more at a time, the larger the product of a list with those that look at it
CHUNK = 4096  # reference rows at a time, so that a product is still in the cache when it is searched
GPU_CHUNK = 65536
STRIP = 256
CANCELS = 0.05  # |x - y|^2 below this share of |x|^2 + |y|^2 is computed by differences: the expansion has lost digits
DIFFERENCES = 32768  # pairs at a time
ALIKE = 1e-5  # of the scale: projections of equal rows differ by less

Find = Callable[[np.ndarray, int], Found]


@dataclass(frozen=True)
class Reference:
    """Rows, ready to be searched.

    rows: float[m, d] as given, of which those with NaN are nobody's neighbours. y: float32[u, d], the different ones
    among the others less their mean `centre`, in the order of the lists if there are any; `squares` their norms.
    Row g of y stands for the given rows members[start[g] : start[g] + size[g]], ascending; given row r is the
    `position`[r]-th of group[r], -1 if it has NaN.
    """

    rows: np.ndarray
    centre: np.ndarray
    y: np.ndarray
    squares: np.ndarray
    members: np.ndarray
    start: np.ndarray
    size: np.ndarray
    group: np.ndarray
    position: np.ndarray
    lists: Lists | None = None

    @classmethod
    def of(cls, rows: np.ndarray, distinct: bool = False, probes: int = 0) -> "Reference":
        """`distinct`: equal rows are one. With `probes`, in inverted lists, of which a search looks at so many."""
        centre = _centre(rows)
        y, squares, usable = _finite(rows, centre)
        (given,) = np.nonzero(usable)
        label = _labels(y[given]) if distinct else np.arange(len(given))
        order = np.argsort(label, kind="stable")
        members, size = given[order], np.bincount(label)
        start = np.cumsum(size) - size
        group, position = np.full(len(rows), -1), np.full(len(rows), -1)
        group[members] = label[order]
        position[members] = np.arange(len(members)) - start[label[order]]
        if len(start) < len(rows):
            y, squares = y[members[start]], squares[members[start]]
        whole = cls(rows, centre, y, squares, members, start, size, group, position)
        if not probes or has_gpu():  # which searches all of them in less time than lists take to make
            return whole
        lists = make_lists(y, probes)
        by_list, group = lists.order, np.where(group < 0, -1, lists.place[group])
        moved = {"y": y[by_list], "squares": squares[by_list], "start": start[by_list], "size": size[by_list]}
        return replace(whole, **moved, group=group, lists=lists)

    @property
    def alone(self) -> bool:
        """Whether all are different."""
        return len(self.start) == len(self.members)

    def find(self, exact: bool) -> Find:
        """The search for the k rows of y with the greatest closeness x.y - |y|^2 / 2, which are the nearest."""
        half = self.squares / 2
        if has_gpu():
            return by_torch(self.y, half, "cuda")
        everywhere = by_numpy(self.y, half)
        return by_lists(self.y, half, self.lists, everywhere) if self.lists and not exact else everywhere


def search(rows: np.ndarray, reference: Reference, own: np.ndarray, k: int, exact: bool = False) -> Found:
    """Distances float32[n, k] and reference rows int64[n, k] of each row's k nearest, nearest first.

    own: int64[n, e], reference rows that are no neighbours of the row (-1: none). Rows of the reference with NaN are
    nobody's neighbours; rows with NaN get NaN distances. `exact`: look into all lists. Raises ValueError where too few
    rows are left.
    """
    distance, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    if not len(rows):
        return distance, index
    y, squares, usable = reference.y, reference.squares, len(reference.members)
    needed = k + own.shape[1]
    if usable < needed:
        raise ValueError(f"k={k} neighbours need {needed} or more usable reference rows; there are {usable}")
    find, groups = reference.find(exact), min(needed, len(y))
    step = QUERIES_OF_LISTS if reference.lists and not exact else QUERIES
    itself = rows is reference.rows and len(y) == len(rows) <= QUERIES and not reference.lists
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        x, norms, good = (y, squares, np.ones(len(y), bool)) if itself else _finite(rows[part], reference.centre)
        closeness, found = find(x, groups)
        squared = norms[:, None] - 2 * closeness
        # the expansion loses the digits of what is small beside its terms
        cancels = squared < CANCELS * (norms[:, None] + squares[found])
        if itself:  # which each row finds, and nothing is to be computed
            oneself = found == np.arange(len(x))[:, None]
            squared[oneself], cancels[oneself] = 0, False
        row, rank = np.nonzero(cancels)
        for first in range(0, len(row), DIFFERENCES):
            at = row[first : first + DIFFERENCES], rank[first : first + DIFFERENCES]
            squared[at] = np.square(x[at[0]] - y[found[at]]).sum(axis=1)
        squared[~good] = np.nan
        order = np.lexsort((reference.members[reference.start[found]], squared), axis=1)
        squared, found = np.take_along_axis(squared, order, 1), np.take_along_axis(found, order, 1)
        at_rank, index[part] = _members(reference, found, own[part], k)
        distance[part] = np.sqrt(np.take_along_axis(squared, at_rank, 1))
    return distance, index


def _members(reference: Reference, found: np.ndarray, own: np.ndarray, k: int) -> Found:
    """Of the groups found, nearest first, the first k given rows that are not `own`: which group each is of, and it."""
    if reference.alone:
        rows = reference.members[reference.start[found]]
        theirs = (rows[:, :, None] == own[:, None, :]).any(axis=2)
        at = np.argsort(theirs, axis=1, kind="stable")[:, :k]
        return at, np.take_along_axis(rows, at, 1)
    group = np.where(own < 0, -1, reference.group[own])
    size = reference.size[found]
    for column in group.T:
        size = size - (found == column[:, None])
    until = np.cumsum(size, axis=1)
    at = (until[:, None, :] <= np.arange(k)[None, :, None]).sum(axis=2)
    which = np.take_along_axis(found, at, 1)
    place = np.arange(k) - np.take_along_axis(until - size, at, 1)
    position = np.where(group < 0, np.iinfo(np.int64).max, reference.position[own])
    for column in np.argsort(position, axis=1).T:  # one's own rows are stepped over, the first of them first
        mine, here = (np.take_along_axis(values, column[:, None], 1) for values in (group, position))
        place = place + ((which == mine) & (place >= here))
    return at, reference.members[reference.start[which] + place]


def _labels(rows: np.ndarray) -> np.ndarray:
    """int[m]: 0, 1, … for the different rows in the order of their first.

    Equal ones lie side by side in the order of a projection. Another that falls between them splits them, which does
    no harm.
    """
    along = rows @ np.random.default_rng(0).standard_normal(rows.shape[1], np.float32)
    order = np.argsort(along, kind="stable")
    step = np.diff(along[order])
    scale = float(np.abs(along).max(initial=0))
    same = np.zeros(len(rows), bool)  # as the one before it in that order
    (near,) = np.nonzero(step <= ALIKE * scale)
    for first in range(0, len(near), CHUNK):
        some = near[first : first + CHUNK]
        same[some + 1] = (rows[order[some]] == rows[order[some + 1]]).all(axis=1)
    heap = np.empty(len(rows), np.int64)
    heap[order] = np.cumsum(~same) - 1 if len(rows) else 0
    _, first_row, label = np.unique(heap, return_index=True, return_inverse=True)
    rank = np.empty(len(first_row), np.int64)
    rank[np.argsort(first_row)] = np.arange(len(first_row))
    return rank[label]


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

    def find(x: np.ndarray, k: int) -> Found:
        values, columns = [], []
        for start in range(0, len(y), CHUNK):
            chunk = y[start : start + CHUNK]
            closeness = buffer[: len(x) * len(chunk)].reshape(len(x), len(chunk))
            if x is y:
                _gram(x, closeness)
            else:
                np.matmul(x, chunk.T, out=closeness)
            closeness -= half[start : start + CHUNK]
            value, at = greatest(closeness, min(k, len(chunk)))
            values.append(value)
            columns.append(at + start)
        return best_of(np.concatenate(values, axis=1), np.concatenate(columns, axis=1), k)

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

    def find(x: np.ndarray, k: int) -> Found:
        rows = torch.from_numpy(x).to(device)
        values, columns = [], []
        for start in range(0, len(there), GPU_CHUNK):
            chunk = there[start : start + GPU_CHUNK]
            closeness = rows @ chunk.T - halves[start : start + GPU_CHUNK]
            value, at = closeness.topk(min(k, len(chunk)), sorted=False)
            values.append(value)
            columns.append(at + start)
        value, best = torch.cat(values, dim=1).topk(k, sorted=False)
        return value.cpu().numpy(), torch.cat(columns, dim=1).gather(1, best).cpu().numpy()

    return find

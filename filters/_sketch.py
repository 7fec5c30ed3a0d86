"""Counts over the whole dataset in fixed memory: a count-min sketch (Cormode & Muthukrishnan, J. Algorithms 2005).

Trade-off: DEPTH x WIDTH counters, 16 MB, whatever the dataset's size. A count is an upper bound: of N additions, all
keys share a background of up to N / WIDTH (by the theorem at most e N / WIDTH more than the truth in 98 % of queries),
which moves all scores alike and not their order; order is blurred by its square root. So of 400M captions a count has
400 too many, give or take 20; below a million there is nothing to see of it. Sketches of shards add up to that of the
dataset in any order. A counter stops at 2^32 - 1.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

DEPTH, BITS = 4, 20
WIDTH = 1 << BITS
# Odd, so that every key is told apart before the shift: multiply-shift hashing (Dietzfelbinger et al. 1997)
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sketch of both; what no longer fits into a counter stays at its greatest."""
    total = one + other
    total[total < one] = np.iinfo(total.dtype).max
    return total


def sketch(keys: np.ndarray) -> np.ndarray:
    """uint32[DEPTH, WIDTH] of keys uint64[n], each counted as often as it comes."""
    return np.stack([np.bincount(cells, minlength=WIDTH).astype(np.uint32) for cells in _cells(keys)])


def count(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int64, in the shape of `keys`: how often each was added, or more."""
    return np.min([row[cells] for row, cells in zip(counters, _cells(keys), strict=True)], axis=0).astype(np.int64)


def background(counters: np.ndarray) -> float:
    """What a count has too many on average: that of keys which were never added.

    The mean counter is far off where few keys are most of the additions: the least of DEPTH rows avoids those.
    """
    return float(count(counters, mixed(np.arange(2**63, 2**63 + 4096, dtype=np.uint64))).mean())


def _cells(keys: np.ndarray) -> Iterable[np.ndarray]:
    for factor in _FACTORS[:DEPTH]:
        yield ((keys * np.uint64(factor)) >> np.uint64(64 - BITS)).astype(np.int64)


def hashed(texts: Sequence[str]) -> np.ndarray:
    """uint64[n]: a key for each text."""
    digests = b"".join(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, np.uint64)


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64: numbers that differ anywhere as keys that differ everywhere (the finaliser of splitmix64)."""
    values = np.asarray(values, np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

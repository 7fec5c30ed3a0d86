"""The pool: reference rows of the neighbour detectors, drawn from all shards.

Trade-off: a random sample instead of the whole dataset, so that it fits into memory, and scoring is one pass. Its size
is part of what a density detector means, and is recorded with the scores. It may be the whole dataset (a million rows
of 512 are 2 GB a column), searched by inverted lists.
"""

import dataclasses
import hashlib
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filters._batch import COLUMNS, Batch, Drawn
from filters._knn import Search, near_within, remember
from pipeline.draw import hash64
from pipeline.errors import InputError
from pipeline.inputs import EARLIER, EMBEDDED, Inputs
from pipeline.shard_map import each, succeeded
from pipeline.shards import Shard, UidRule, uids
from pipeline.shards.sample import check_unique

BLOCK = 4096  # rows of the pool whose neighbours are one task


@dataclass(frozen=True)
class Pool:
    rows: Batch
    models: dict[str, str]


def draw_pool(
    shards: Sequence[Shard],
    inputs: Inputs,
    wanted: Collection[str],
    size: int,
    seed: int,
    max_failed: int,
    k: int = 0,
    probes: int = 0,
) -> Pool:
    """`size` pairs with the smallest hashes of (seed, uid), less unusable ones: the same however the data is sharded.

    Two passes: over the uids alone, then over the shards that hold the pairs. Usable is who has every column `wanted`.
    """
    drawn = _smallest(shards, inputs.uid, size, seed, max_failed)
    by_shard: dict[str, list[str]] = {}
    for _, who, where in drawn:
        by_shard.setdefault(where, []).append(who)
    rank = {who: i for i, (_, who, _) in enumerate(drawn)}
    parts: list[Batch] = []
    models: dict[str, str] = {}
    there = [s for s in shards if s.name in by_shard]
    for shard, found in succeeded(each("pool", there, _Columns(inputs), by_shard, wanted), max_failed):
        check_one_model(models, found.models, shard.name)
        models = found.models
        parts.append(found.rows)
    rows = _joined(parts)
    rows = rows.take(np.argsort([rank[who] for who in rows.uid]))
    if not len(rows):
        raise InputError(f"{inputs.embeddings}: no usable pairs for a pool of {size}")
    check_unique(rows.uid.tolist(), "the pool")
    digests = tuple((name, _digest(getattr(rows, name))) for name in sorted({"uid", *wanted}))
    return Pool(dataclasses.replace(rows, drawn=Drawn(k, digests, probes)), models)


def _digest(values: np.ndarray) -> str:
    data = repr(values.tolist()).encode() if values.dtype == object else np.ascontiguousarray(values).data
    return hashlib.sha256(data).hexdigest()


def _smallest(
    shards: Sequence[Shard], uid: UidRule, size: int, seed: int, max_failed: int
) -> list[tuple[int, str, str]]:
    """Hash, uid and shard of the `size` smallest hashes.

    A shard offers four times its share; the few in which more might be among the smallest are asked again, for all.
    """
    few = min(size, 64 + 4 * size // len(shards))
    drawn: list[tuple[int, str, str]] = []
    more: dict[str, int] = {}  # by shard that has more than it offered, the largest hash of those
    asked: Sequence[Shard] = shards
    failed: list[InputError] = []
    for most in (few, size):
        again = {shard.name for shard in asked}
        drawn = [one for one in drawn if one[2] not in again]
        for shard, offer in succeeded(each("pool", asked, _Offer(seed, most, uid)), max_failed, failed):
            drawn = heapq.nsmallest(size, drawn + offer.drawn)
            if len(offer.drawn) < offer.read:
                more[shard.name] = offer.drawn[-1][0]
        bound = drawn[-1][0] if len(drawn) == size else 2**64
        asked = [shard for shard in shards if more.get(shard.name, 2**64) < bound]
    return drawn


def look_within(pool: Batch, wanted: Mapping[tuple[str, ...], int]) -> None:
    """Find, by columns, how far the k nearest of each row of the pool are there; the pool keeps it, for all shards."""
    for columns, k in wanted.items():
        n = len(pool) * len(columns)
        parts = [slice(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]
        blocks = [_Block(f"the pool's row {part.start}", part) for part in parts]
        distances = np.empty((n, k), np.float32)
        for block, found in succeeded(each("neighbours within the pool", blocks, _Within(columns, k), pool)):
            distances[block.rows] = found.distances
        remember(pool, None, {Search("", columns): (distances, np.empty((n, 0), np.int64))})


def check_one_model(models: dict[str, str], theirs: dict[str, str], shard: str) -> None:
    """Raises InputError where the embeddings of this shard are by another model than those before."""
    for option, model in theirs.items():
        if models.get(option, model) != model:
            raise InputError(f"--{option}: shard {shard} was embedded by another model; embed all with one")


@dataclass(frozen=True)
class _Offered:
    read: int
    drawn: list[tuple[int, str, str]]


@dataclass(frozen=True)
class _Offer:
    """The pairs of a shard that may be in the pool: hash, uid, shard."""

    seed: int
    size: int
    uid: UidRule

    def __call__(self, shard: Shard) -> _Offered:
        every = uids(shard, self.uid)
        hashes = ((hash64(self.seed, "pool", who), who, shard.name) for who in every)
        return _Offered(len(every), heapq.nsmallest(self.size, hashes))


@dataclass(frozen=True)
class _Held:
    read: int
    models: dict[str, str]
    rows: Batch


@dataclass(frozen=True)
class _Columns:
    """The pool's pairs of a shard that have all their values."""

    inputs: Inputs

    def __call__(self, shard: Shard, by_shard: dict[str, list[str]], wanted: Collection[str]) -> _Held:
        found, models = self.inputs.batch(shard, by_shard[shard.name], wanted)
        usable = np.ones(len(found), bool)
        for name in wanted:
            values = getattr(found, name)
            if values.dtype == object:
                usable &= np.asarray([value is not None for value in values], bool)
            elif name in (*EMBEDDED, *EARLIER):
                usable &= np.isfinite(values).all(axis=1) & values.any(axis=1)  # zeros have no direction
        if len(found.decoded):
            usable &= found.decoded
        return _Held(len(found), models, found.take(np.flatnonzero(usable)))


@dataclass(frozen=True)
class _Block:
    path: str
    rows: slice


@dataclass(frozen=True)
class _Neighbours:
    read: int
    distances: np.ndarray


@dataclass(frozen=True)
class _Within:
    columns: tuple[str, ...]
    k: int

    def __call__(self, block: _Block, pool: Batch) -> _Neighbours:
        distances, _ = near_within(pool, self.columns, self.k, block.rows)
        return _Neighbours(len(distances), distances)


def _joined(parts: Sequence[Batch]) -> Batch:
    parts = [part for part in parts if len(part)]
    if not parts:
        return Batch(np.empty(0, object))
    for name in COLUMNS:
        if len(widths := {getattr(part, name).shape[1:] for part in parts}) > 1:
            told = " and ".join(str(*width) for width in sorted(widths))
            raise InputError(f"embeddings of {told} numbers a pair ({name}); embed all shards with one model")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Batch(**columns)

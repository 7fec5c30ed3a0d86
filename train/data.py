"""Shards -> batches: without replacement, in an order that is a function of (seed, epoch, uid) alone.

Trade-off: one pass over the shards decodes every image before the first step, so the number of pairs, and with it
every batch, is known and a bad sample is counted once. Pixels stay in memory as uint8 at the recipe's size while they
fit `WINDOW_BYTES`; then the order is a shuffle of everything. Beyond that, shards are shuffled, and pairs within a
window of shards that fits; each epoch decodes again, in threads that hide behind the steps. What grows with the data
set is the index: 32 bytes of uid and 4 per token of context for each pair.

Every rank derives the same global order and takes its slice of each global batch. While all pixels fit, pairs that two
data sets share come in the same relative order in both, so a run on filtered shards differs from the other by the
filter and not by the luck of the draw. Beyond, the filter also moves the edges of the windows.
"""

import hashlib
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples
from pipeline.shards.image import pixels
from pipeline.shards.store import view
from train.augmentation import augment
from train.draws import DEFENSE, PIXELS, keys_of, mix
from train.recipes import Recipe

WINDOW_BYTES = 2 * 1024**3
DECODERS = min(max(2, len(os.sched_getaffinity(0))), 16)  # threads; PIL lets go of the interpreter while it decodes
T = TypeVar("T")


@dataclass(frozen=True)
class Index:
    """The n good pairs of a data set in file order: shard number, position in the shard, uid (ASCII), tokens, pixels.

    `pixels` is uint8 [n, size, size, 3], or None where it exceeds `window_bytes`.
    """

    shards: tuple[Shard, ...]
    shard: np.ndarray
    position: np.ndarray
    uid: np.ndarray
    tokens: np.ndarray
    pixels: np.ndarray | None
    size: int
    rule: UidRule
    skipped: dict[str, int]
    window_bytes: int = WINDOW_BYTES

    def __len__(self) -> int:
        return len(self.uid)


@dataclass(frozen=True)
class Batch:
    """This rank's slice of a global batch. `rows` are int64[n] into the index, `total` the size of the global batch.

    images uint8 [n, 3, s, s] in channels_last memory, augmented; tokens int64 [n, context]. `keys` are uint64[n] of
    (seed, epoch, uid), which is all that a defense's augmentation may be random by. A defense may lay a second view of
    every pair below the first, [2n, ...] of images and tokens.
    """

    rows: np.ndarray
    images: torch.Tensor
    tokens: torch.Tensor
    total: int
    epoch: int
    keys: np.ndarray


def digest(shards: Sequence[Shard]) -> str:
    """16 hex digits over the names and the bytes of the shards."""
    sha = hashlib.sha256()
    for shard in shards:
        sha.update(f"{shard.file}\0{hashlib.sha256(view(shard.path)).hexdigest()}\n".encode())
    return sha.hexdigest()[:16]


def reason(error: Rejected) -> str:
    """Why a sample was rejected, without what is particular to it, so that reasons can be counted."""
    return re.sub(r"\d+x\d+ pixels", "too many pixels", str(error))


def index(
    shards: Sequence[Shard],
    size: int,
    tokenizer: Any,
    uid: UidRule = "key",
    *,
    rank: int = 0,
    world: int = 1,
    window_bytes: int = WINDOW_BYTES,
    only: Mapping[str, Collection[str]] | None = None,
) -> Index:
    """Read every sample once; with several ranks each reads its share and they exchange what they found.

    `only`: of the shards with these paths, no other uids than these, and all of these.
    Raises InputError on every rank for a broken shard, a uid that occurs twice or is missing, or nothing to train on.
    """
    mine: dict[int, _Part] = {}
    failed: InputError | None = None
    room = window_bytes
    images: dict[int, np.ndarray] = {}
    try:
        for number in range(rank, len(shards), world):
            wanted = (only or {}).get(shards[number].path)
            mine[number], found = _index_shard(shards[number], size, tokenizer, uid, room >= 0, wanted)
            room -= found.nbytes
            images[number] = found
            if room < 0:
                images.clear()
    except InputError as error:
        failed = error
    parts: dict[int, _Part] = {}
    for theirs in gathered(failed or mine, world):
        if isinstance(theirs, InputError):
            raise theirs
        parts |= theirs
    ordered = [parts[i] for i in range(len(shards))]
    counts = [len(p.position) for p in ordered]
    total = sum(counts)
    skipped = sum((p.skipped for p in ordered), Counter())
    if total < 2 * world:
        raise InputError(
            f"{shards[0].path}: only {total} usable pairs in {len(shards)} shards, training needs {2 * world}; "
            f"skipped: {listed(skipped)}"
        )
    fits = total * size * size * 3 <= window_bytes
    result = Index(
        tuple(shards),
        np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        np.concatenate([p.position for p in ordered]),
        np.concatenate([p.uid for p in ordered]),
        np.concatenate([p.tokens for p in ordered]),
        _every_image(images, counts, size, world) if fits else None,
        size,
        uid,
        dict(sorted(skipped.items())),
        window_bytes,
    )
    _check_unique(result)
    _check_arrived(result, only or {})
    return result


def listed(skipped: dict[str, int] | Counter[str]) -> str:
    """`{"empty caption": 3}` -> `3 empty caption`, most frequent first."""
    return "; ".join(f"{n:,} {why}" for why, n in sorted(skipped.items(), key=lambda item: -item[1])) or "none"


def order(index: Index, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the index in the order of an epoch, int64[n], and the window that each belongs to, non-decreasing."""
    window = np.zeros(len(index), np.int64)
    if index.pixels is None:
        names = [int.from_bytes(hashlib.sha256(s.name.encode()).digest()[:8], "big") for s in index.shards]
        shuffled = np.argsort(mix(np.array(names, np.uint64), seed, epoch), kind="stable")
        sizes = np.bincount(index.shard, minlength=len(index.shards)) * index.size**2 * 3
        number, filled, of_shard = 0, 0, np.zeros(len(index.shards), np.int64)
        for shard in shuffled:
            # a third: one window is trained on, one waits, one is being decoded
            if filled and filled + sizes[shard] > index.window_bytes // 3:
                number, filled = number + 1, 0
            of_shard[shard] = number
            filled += sizes[shard]
        window = of_shard[index.shard]
    rows = np.lexsort((mix(keys_of(index.uid), seed, epoch), window))
    return rows, window[rows]


def cuts(n: int, batch: int, world: int) -> np.ndarray:
    """Where an epoch of n pairs is cut into global batches: edges int64[steps + 1].

    Nearly equal batches of at most `batch` pairs instead of full ones and a remainder, because batch statistics and the
    number of negatives of a small last batch would be those of another recipe. The last ends where the ranks are equal,
    which leaves at most world - 1 pairs of an epoch out, other ones in each. Edges are multiples of 8, so that any
    worker count that divides 8 sees the same batches up to there, unless they have fewer than 32 pairs, or the
    recipe's batch is no multiple of 8.
    """
    steps, grain = -(-n // batch), 8
    if 8 % world or batch % 8 or n // steps < 32:
        n -= n % world
        steps, grain = -(-n // max(batch - batch % world, world)), world
    edges = -(-(np.arange(steps + 1) * n // steps) // grain) * grain
    edges[-1] = n - n % world
    return edges


def batches(
    index: Index,
    recipe: Recipe,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    chosen: np.ndarray | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of an epoch (1-based), augmented, prepared by a thread while the last one is trained on.

    `chosen` bool[n]: an epoch of these rows of the index only. `first`: from this batch (0-based) on.
    """
    rows, window = order(index, seed, epoch)
    if chosen is not None:
        rows, window = rows[chosen[rows]], window[chosen[rows]]
    if not len(rows):
        raise InputError(f"epoch {epoch}: the defense leaves no pair to train on; let it skip less, or give it more")
    edges = cuts(len(rows), recipe.batch, world)[first:]
    slices = [np.arange(a + (b - a) // world * rank, a + (b - a) // world * (rank + 1)) for a, b in pairwise(edges)]
    keys = keys_of(index.uid)

    def prepared() -> Generator[Batch, None, None]:
        mine = np.concatenate(slices)
        chunks = _pixels(index, rows[mine], window[mine])
        stock = next(chunks)
        for part, total in zip(slices, np.diff(edges), strict=True):
            while len(stock) < len(part):
                stock = np.concatenate([stock, next(chunks)])
            images, stock = stock[: len(part)], stock[len(part) :]
            at = rows[part]
            images = augment(images, recipe, mix(keys[at], seed, epoch, PIXELS))
            tokens = torch.from_numpy(index.tokens[at].astype(np.int64))
            pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
            yield Batch(at, pictures, tokens, int(total), epoch, mix(keys[at], seed, epoch, DEFENSE))

    return prefetch(prepared(), 4)


def prefetch(source: Generator[T, None, None], depth: int) -> Iterator[T]:
    """The items of `source`, made by a thread that stays at most `depth` ahead. Its exceptions are raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))
        finally:
            source.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            good, item = ready.get()
            if good:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
        thread.join()


@dataclass
class _Part:
    """The index of one shard, without its images."""

    position: np.ndarray
    uid: np.ndarray
    tokens: np.ndarray
    skipped: Counter[str]


def _index_shard(
    shard: Shard, size: int, tokenizer: Any, uid: UidRule, keep: bool, only: Collection[str] | None
) -> tuple[_Part, np.ndarray]:
    """The index of a shard, and if `keep` its images, uint8 [n, size, size, 3]."""
    places: list[int] = []  # of the samples that are looked at
    positions, uids, captions, images = [], [], [], []
    skipped: Counter[str] = Counter()

    def wanted() -> Iterator[Sample]:
        for place, sample in enumerate(samples(shard, uid)):
            if only is None or sample.uid in only:
                places.append(place)
                yield sample

    def look(sample: Sample) -> tuple[str, np.ndarray] | str:
        try:
            return sample.caption, pixels(sample, size)
        except Rejected as error:
            return reason(error)

    for i, (sample, result) in enumerate(_mapped(look, wanted())):
        if isinstance(result, str):
            skipped[result] += 1
            continue
        positions.append(places[i])
        uids.append(sample.uid.encode())
        captions.append(result[0])
        if keep:
            images.append(result[1])
    context = tokenizer.context_length
    tokens = tokenizer(captions).numpy().astype(np.int32) if captions else np.empty((0, context), np.int32)
    part = _Part(np.array(positions, np.int32), np.array(uids, "S32"), tokens, skipped)
    return part, np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)


def _mapped(function: Any, items: Iterator[Sample]) -> Iterator[tuple[Sample, Any]]:
    """(item, function(item)) in order, a few hundred at a time over the decoding threads."""
    with ThreadPoolExecutor(DECODERS) as pool:
        block: list[Sample] = []
        for item in items:
            block.append(item)
            if len(block) == 256:
                yield from zip(block, pool.map(function, block), strict=True)
                block = []
        yield from zip(block, pool.map(function, block), strict=True)


def _pixels(index: Index, rows: np.ndarray, window: np.ndarray) -> Iterator[np.ndarray]:
    """The pixels of `rows` in that order, a window at a time: from memory, or decoded again one window ahead."""
    edges = np.flatnonzero(np.diff(window, prepend=-1, append=-1))
    parts = [rows[a:b] for a, b in pairwise(edges)]
    if index.pixels is not None:
        for part in parts:
            for start in range(0, len(part), 1024):  # a gather of everything at once would double the memory
                yield index.pixels[part[start : start + 1024]]
        return
    yield from prefetch((_decoded(index, part) for part in parts), 1)


def _decoded(index: Index, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), index.size, index.size, 3), np.uint8)
    for number in np.unique(index.shard[rows]):
        at = np.flatnonzero(index.shard[rows] == number)
        wanted = dict(zip(index.position[rows[at]].tolist(), at.tolist(), strict=True))
        shard = index.shards[number]
        chosen = (s for i, s in enumerate(samples(shard, index.rule)) if i in wanted)
        slots = [wanted[i] for i in sorted(wanted)]
        try:
            for slot, (_, image) in zip(slots, _mapped(lambda s: pixels(s, index.size), chosen), strict=True):
                out[slot] = image
        except ValueError as error:  # Rejected, or fewer samples than before
            raise InputError(f"{shard.path}: changed while it was trained on; start again in another folder") from error
    return out


def _every_image(mine: dict[int, np.ndarray], counts: Sequence[int], size: int, world: int) -> np.ndarray:
    """uint8 [n, size, size, 3] of all shards; each rank has its own, and gives them up. One shard at a time is sent."""
    out = np.empty((sum(counts), size, size, 3), np.uint8)
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *counts]))):
        sent: list[Any] = [mine.pop(number, None)]
        if world > 1:
            dist.broadcast_object_list(sent, src=number % world)
        out[start:end] = sent[0]
    return out


def gathered(mine: Any, world: int) -> list[Any]:
    """The object of every rank, by rank."""
    if world == 1:
        return [mine]
    theirs: list[Any] = [None] * world
    dist.all_gather_object(theirs, mine)
    return theirs


def _check_arrived(index: Index, only: Mapping[str, Collection[str]]) -> None:
    wanted = sorted(uid for uids in only.values() for uid in uids)
    came = np.isin(np.array([uid.encode() for uid in wanted], "S32"), index.uid)
    if not came.all():
        raise InputError(
            f"{min(only)}: {came.sum()} of {len(wanted)} pairs that were drawn from there can be trained on, "
            f"{wanted[int(came.argmin())]} cannot (skipped: {listed(index.skipped)}); give --uid as the shards were "
            "poisoned with, or another --seed"
        )


def _check_unique(index: Index) -> None:
    sorted_rows = np.argsort(index.uid, kind="stable")
    uids = index.uid[sorted_rows]
    twice = np.flatnonzero(uids[1:] == uids[:-1])
    if len(twice):
        first, second = (index.shards[index.shard[sorted_rows[twice[0] + i]]].path for i in (0, 1))
        raise InputError(
            f"{first} and {second}: uid {uids[twice[0]].decode()} is in both ({len(twice):,} such); uids must be "
            "unique (--uid shard/key if keys repeat per shard, or remove the copy)"
        )

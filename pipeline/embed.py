"""Image and text embeddings of every pair, joined by uid and never by position.

Trade-off: features are kept as the model gives them (not normalised) in half precision: density detectors are defined
on them, and who wants cosines normalises in a line. A pair the model could not see keeps its row, as NaN.
"""

import functools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline import sidecars
from pipeline.arguments import Out, Shards
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.published_embeddings import Index, Published, PublishedModel, find_published, make_index, take
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Rejected, Sample, Shard, UidRule, list_shards, samples
from pipeline.shards.image import pixels
from pipeline.shards.store import absolute, join

BATCH = 256
MOST_DECODERS = 16  # a device; machines with eight of them have more cores than a hundred
T = TypeVar("T")


def embed(
    shards: Shards,
    out: Out,
    /,
    *,
    checkpoint: str | None = None,
    published: str | None = None,
    model: PublishedModel | None = None,
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Embed SHARDS with a checkpoint, or look up what others published; writes OUT/<shard>.embeddings.parquet.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for the embeddings.
        checkpoint: a folder that `train` wrote, or open_clip:MODEL/PRETRAINED.
        published: instead of a checkpoint, a folder of embeddings of these pairs: clip-retrieval's or DataComp's.
        model: which of DataComp's two published models; default l14.
        uid: how a uid is derived where samples carry none; the same as when the shards were poisoned.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    if (checkpoint is None) == (published is None):
        raise InputError("give either --checkpoint, to embed, or --published, to look up what others embedded")
    listed, out = list_shards(shards), absolute(out)
    if checkpoint is None:
        return _look_up(listed, out, absolute(str(published)), model, uid, max_failed_shards)
    if model:
        raise InputError("--model chooses among published embeddings; name a model to embed with by --checkpoint")
    from train.model import load

    if not checkpoint.startswith("open_clip:"):
        checkpoint = absolute(checkpoint)
    loaded = load(checkpoint)  # here only to fail early and to know the digest
    job = Job("embed", {"model": loaded.digest, "uid": uid}, out, max_failed_shards)
    markers = shard_map(job, listed, _Embed(checkpoint, loaded.digest, uid), gpu=True)
    _report(markers, f"embedded with model {loaded.digest}")
    return 0


def _look_up(
    listed: list[Shard], out: str, folder: str, model: PublishedModel | None, uid: UidRule, max_failed: int
) -> int:
    if uid != "key":
        raise InputError(f"--uid {uid}: {folder} does not say which shard a row was in; only --uid key finds it")
    published = find_published(folder, model)
    index = make_index(published, join(out, "published_index"))
    job = Job("embed", {"model": published.model, "uid": uid}, out, max_failed)
    markers = shard_map(job, listed, _take, published, index)
    _report(markers, f"found among those published as {published.model}")
    if not any(m["out"] for m in markers) and any(m["read"] for m in markers):
        raise InputError(f"{folder}: none of these pairs is published here; are the keys those of the same dataset?")
    return 0


def _report(markers: list[dict[str, Any]], how: str) -> None:
    failed = sum(m["failed"] for m in markers)
    total = sum(m["read"] for m in markers)
    console.print(f"{total - failed:,} of {total:,} pairs {how}")
    if failed:
        reasons: dict[str, int] = {}
        for marker in markers:
            for reason, n in marker["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + n
        console.print("  without embeddings, most suspicious to every detector: " + _listed(reasons))


@dataclass(frozen=True)
class Embeddings:
    """uid str[n], image and text float32[n, d], [0, 0] where not read; NaN rows where a pair could not be embedded."""

    uid: np.ndarray
    image: np.ndarray
    text: np.ndarray
    model: str


def embeddings_path(folder: str, shard_name: str) -> str:
    return join(folder, f"{shard_name}.embeddings.parquet")


def read_embeddings(path: str, columns: Sequence[str] = ("image", "text")) -> Embeddings:
    """Read a sidecar; raises InputError where it is missing or its columns are not embeddings."""
    table = sidecars.read(path, ("uid", *columns), "make the embeddings with `mithridate embed`", only=True)
    try:
        model = json.loads((table.schema.metadata or {})[b"mithridate"])["model"]
        image, text = (
            _embeddings(table.column(name)) if name in columns else np.empty((0, 0), np.float32)
            for name in ("image", "text")
        )
    except (KeyError, ValueError, AttributeError) as error:
        why = "no model in its metadata" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: not embeddings ({why}); make them with `mithridate embed`") from error
    return Embeddings(np.asarray(table.column("uid").to_pylist(), dtype=object), image, text, model)


@dataclass(frozen=True)
class _Embed:
    checkpoint: str
    digest: str
    uid: UidRule

    def __call__(self, shard: Shard, out: str) -> Counts:
        counts = Counts(output=f"{shard.name}.embeddings.parquet")
        with _timed(counts, "load"):
            model = _model(self.checkpoint)
        if model.digest != self.digest:
            raise InputError(f"{self.checkpoint}: this node sees another checkpoint ({model.digest}); share the folder")
        uids: list[str] = []
        good: list[bool] = []
        captions: list[str] = []
        rows = [np.empty((0, model.dimension), np.float32)]
        batches = _batches(shard, self.uid, model.image_size, counts, _decoders(model.device.type))
        while True:
            with _timed(counts, "wait"):
                batch = next(batches, None)
            if batch is None:
                break
            uids += batch.uids
            good += batch.good
            captions += batch.captions
            if batch.images:
                with _timed(counts, "image"):
                    rows.append(model.embed_images(np.stack(batch.images)))
        with _timed(counts, "text"):  # of the whole shard: the more, the more are equal or of one length
            texts = model.embed_texts(captions)
        counts.out = counts.read - counts.failed
        image, text = (_with_gaps(values, good) for values in (np.concatenate(rows), texts))
        with _timed(counts, "write"):
            _write(join(out, counts.output), uids, image, text, self.digest)
        return counts


@contextmanager
def _timed(counts: Counts, name: str) -> Iterator[None]:
    clock = time.perf_counter()
    yield
    counts.seconds[name] = counts.seconds.get(name, 0.0) + time.perf_counter() - clock


def _with_gaps(values: np.ndarray, good: list[bool]) -> np.ndarray:
    """float16 [n, d]: the rows of `values` where `good`, NaN elsewhere."""
    out = np.full((len(good), values.shape[1]), np.nan, np.float16)
    out[np.asarray(good, bool)] = values
    return out


def _take(shard: Shard, out: str, published: Published, index: Index) -> Counts:
    counts = Counts(output=f"{shard.name}.embeddings.parquet")
    uids, image, text = take(shard, published, index, counts)
    counts.out = counts.read - counts.failed
    _write(join(out, counts.output), uids, image, text, published.model)
    return counts


@dataclass
class _Batch:
    uids: list[str]
    good: list[bool]
    images: list[np.ndarray]
    captions: list[str]


def _batches(shard: Shard, uid: UidRule, size: int, counts: Counts, threads: int) -> Iterator[_Batch]:
    def look(sample: Sample) -> tuple[str, str, np.ndarray | None]:
        try:
            return sample.uid, sample.caption, pixels(sample, size)
        except Rejected as error:
            return sample.uid, str(error), None

    batch = _Batch([], [], [], [])
    for who, said, image in _ahead(look, samples(shard, uid), threads):
        counts.read += 1
        batch.uids.append(who)
        batch.good.append(image is not None)
        if image is None:
            counts.failed += 1
            counts.reasons[said] = counts.reasons.get(said, 0) + 1
        else:
            batch.images.append(image)
            batch.captions.append(said)
        if len(batch.uids) == BATCH:
            yield batch
            batch = _Batch([], [], [], [])
    if batch.uids:
        yield batch


def _ahead(look: Callable[[Sample], T], items: Iterator[Sample], threads: int) -> Iterator[T]:
    """`look` of every sample, in order; `threads` of them work on the next batch while the model is at this one."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(look, item))
                if len(waiting) == 2 * BATCH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # of a reader that has met a broken place in the shard


def _decoders(device: str) -> int:
    """Threads that decode for a worker; Pillow lets go of the interpreter. A CPU's cores are busy with the forward."""
    return min(len(os.sched_getaffinity(0)), MOST_DECODERS) if device == "cuda" else 1


@functools.lru_cache(maxsize=1)
def _model(checkpoint: str) -> Any:
    """One model a worker process, on one thread: the parallelism is in the shards."""
    import torch

    from train.model import load

    torch.set_num_threads(1)
    return load(checkpoint)


def _write(path: str, uids: list[str], image: np.ndarray, text: np.ndarray, model: str) -> None:
    import pyarrow as pa

    halves = {name: rows.astype(np.float16, copy=False) for name, rows in (("image", image), ("text", text))}
    columns = {"uid": pa.array(uids, pa.string()), **{name: sidecars.fixed(rows) for name, rows in halves.items()}}
    table = pa.table(columns).replace_schema_metadata({"mithridate": json.dumps({"model": model})})
    # a dictionary of half-precision numbers saves 6% and makes reading six times as long
    sidecars.save(path, table, compression="none", use_dictionary=False)


def _embeddings(column: Any) -> np.ndarray:
    """float32 [n, d]; a null row becomes NaN, so that row i stays row i."""
    rows = sidecars.matrix(column).astype(np.float32)
    rows[column.combine_chunks().is_null().to_numpy(zero_copy_only=False)] = np.nan
    return rows


def _listed(reasons: dict[str, int]) -> str:
    return "; ".join(f"{n} x {reason}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    from pipeline.cli import run

    run("embed")

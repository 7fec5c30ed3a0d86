"""Run detectors and keep their scores beside the data; nothing is decided here.

Trade-off: every detector sees one shard and one pool of reference rows drawn from all shards, so scoring is one pass
without an index. The pool's size is part of a density detector's meaning and is recorded with the scores.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filters._batch import Batch
from pipeline import sidecars, spec
from pipeline.arguments import Out, Shards
from pipeline.draw import hash64
from pipeline.embed import embeddings_path, read_embeddings
from pipeline.errors import InputError
from pipeline.ledger import beside, poisoned_uids
from pipeline.progress import console
from pipeline.shard_map import Job, check_made_from, each, shard_map
from pipeline.shards import Counts, Shard, UidRule, list_shards, manifest
from pipeline.shards.sample import check_unique
from pipeline.shards.store import absolute, existing, glob, join, stamp


def score(
    shards: Shards,
    out: Out,
    /,
    *,
    detector: tuple[str, ...],
    embeddings: str | None = None,
    traces: str | None = None,
    ledger: str | None = None,
    pool: int = 16384,
    seed: int = 0,
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Score SHARDS with detectors; writes OUT/<shard>.scores.parquet, higher = more suspicious.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for the scores.
        detector: one or more, e.g. "slof(k=16)" clip_score; see `mithridate list detectors`.
        embeddings: folder that `mithridate embed` wrote for these shards.
        traces: folder of traces that `mithridate train` wrote for these shards.
        ledger: for `oracle`; default: ledger.parquet beside the shards.
        pool: reference rows of the neighbour detectors, drawn from all shards.
        seed: another seed draws another pool.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    listed, out = list_shards(shards), absolute(out)
    embeddings, traces = (absolute(f) if f else f for f in (embeddings, traces))
    entries = [spec.parse("detectors", text) for text in detector]
    needs = {need for entry in entries for need in entry.needs}
    wants_embeddings = bool(needs & {"image_embedding", "text_embedding"})
    if wants_embeddings and not embeddings:
        raise InputError("these detectors need --embeddings; make them with `mithridate embed`")
    if needs & {"similarity_trace", "loss_trace"} and not traces:
        raise InputError("these detectors need --traces; `mithridate train` writes them to its OUT/traces")
    known = None
    if "poisoned" in needs:
        known = poisoned_uids(ledger or beside(listed))
    reference = _pool(listed, str(embeddings), pool, seed, max_failed_shards) if wants_embeddings else None
    for entry in entries:
        if reference and not 0 < getattr(entry, "k", 1) < len(reference.rows):
            raise InputError(
                f"{spec.text(entry)}: k must be between 1 and the pool's {len(reference.rows)} rows less one"
            )
    names = [spec.text(entry) for entry in entries]
    read = [embeddings_path(str(embeddings), shard.name) for shard in listed] if reference else []
    there = existing(read)
    read = [path for path in read if path in there]
    read += _trace_files(traces) if traces else []
    facts = {
        "detectors": names,
        "model": reference.model if reference else "",
        "pool": len(reference.rows) if reference else 0,
        "pool_digest": reference.digest if reference else "",
        "seed": seed,
        "uid": uid,
        "inputs": spec.digest([stamp(path) for path in read]),
        "ledger": spec.digest(sorted(known)) if known is not None else "",
    }
    work = _Score(tuple(entries), embeddings if reference else None, traces, uid, facts)
    markers = shard_map(
        Job("score", facts, out, max_failed_shards), listed, work, reference.rows if reference else None, known
    )
    total = sum(m["read"] for m in markers)
    for name in names:
        spent = sum(m["seconds"].get(name, 0.0) for m in markers)
        unscored = sum(m["facts"]["unscored"][name] for m in markers)
        note = f", {unscored} unscored (taken as most suspicious)" if unscored else ""
        console.print(f"  {name}: {1e6 * spent / max(total, 1):.1f} µs a pair{note}")
    return 0


def scores_path(folder: str, shard_name: str) -> str:
    return join(folder, f"{shard_name}.scores.parquet")


def read_scores(path: str) -> dict[str, np.ndarray]:
    """`uid` str[n] and one float32[n] a detector spec."""
    table = sidecars.read(path, ("uid",), "make the scores with `mithridate score`")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


@dataclass(frozen=True)
class _Pool:
    rows: Batch
    model: str
    digest: str


@dataclass(frozen=True)
class _Score:
    """All detectors over one shard."""

    entries: tuple[Any, ...]
    embeddings: str | None
    traces: str | None
    uid: UidRule
    facts: dict[str, Any]

    def __call__(self, shard: Shard, out: str, pool: Batch | None, known: set[str] | None) -> Counts:
        content = manifest(shard, self.uid)
        check_unique(content.uids, shard.path)
        sha256 = content.sha256
        if self.embeddings:
            check_made_from(self.embeddings, shard, sha256, "run `mithridate embed` on them")
        batch = self._batch(shard, content.uids, known)
        counts = Counts(read=len(batch), out=len(batch), output=f"{shard.name}.scores.parquet", input_sha256=sha256)
        columns: dict[str, np.ndarray] = {}
        unscored: dict[str, int] = {}
        for entry in self.entries:
            clock, name = time.perf_counter(), spec.text(entry)
            columns[name] = np.asarray(entry.score(batch, pool), np.float32)
            counts.seconds[name] = time.perf_counter() - clock
            unscored[name] = int(np.isnan(columns[name]).sum())
        counts.facts = {"unscored": unscored}
        _write(join(out, counts.output), batch.uid, columns, self.facts)
        return counts

    def _batch(self, shard: Shard, who: list[str], known: set[str] | None) -> Batch:
        joined: dict[str, np.ndarray] = {}
        if self.embeddings:
            found = read_embeddings(embeddings_path(self.embeddings, shard.name))
            rows = _join(who, found.uid)
            if who and (rows < 0).all():
                raise InputError(
                    f"{self.embeddings}: no uid of {shard.path} is here; is it of other data, or of another --uid?"
                )
            joined["image_embedding"] = _take(found.image, rows)
            joined["text_embedding"] = _take(found.text, rows)
        if self.traces:
            trace = _read_traces(self.traces, shard.name)
            rows = _join(who, trace["uid"])
            joined["similarity_trace"] = _take(trace["similarity"], rows)
            joined["loss_trace"] = _take(trace["loss"], rows)
        if known is not None:
            joined["poisoned"] = np.asarray([u in known for u in who], bool)
        return Batch(np.asarray(who, dtype=object), **joined)


def _pool(shards: Sequence[Shard], embeddings: str, size: int, seed: int, max_failed: int) -> _Pool:
    """`size` rows with the smallest hashes of (seed, uid): the same pool however the data is sharded.

    Every shard offers its smallest, of which most are thrown away again: one pass, and no more than `size` rows are
    held besides those of the shard in hand.
    """
    hashes = np.empty(0, np.uint64)
    uid, image, text = np.empty(0, object), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    models: set[str] = set()
    for shard, found in each("pool", shards, _Draw(embeddings, seed, size)):
        if isinstance(found, InputError):
            max_failed -= 1
            if max_failed < 0:
                raise found
            continue
        models.add(found.model)
        if len(models) > 1:
            raise InputError(f"{embeddings}: shard {shard.name} was embedded by another model; embed all with one")
        hashes = np.concatenate([hashes, found.hashes])
        keep = np.lexsort((np.concatenate([uid, found.uid]).astype(str), hashes))[:size]
        hashes, uid = hashes[keep], np.concatenate([uid, found.uid])[keep]
        image = np.concatenate([image.reshape(-1, found.image.shape[1]), found.image])[keep]
        text = np.concatenate([text.reshape(-1, found.text.shape[1]), found.text])[keep]
    if not len(uid):
        raise InputError(f"{embeddings}: no usable embeddings for a pool of {size} rows")
    check_unique(uid.tolist(), embeddings)
    digest = hashlib.sha256("".join(uid).encode() + image.tobytes() + text.tobytes()).hexdigest()
    return _Pool(Batch(uid, image, text), models.pop(), digest)


@dataclass(frozen=True)
class _Drawn:
    read: int
    model: str
    hashes: np.ndarray
    uid: np.ndarray
    image: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class _Draw:
    embeddings: str
    seed: int
    size: int

    def __call__(self, shard: Shard) -> _Drawn:
        found = read_embeddings(embeddings_path(self.embeddings, shard.name))
        hashes = np.asarray([hash64(self.seed, "pool", u) for u in found.uid], np.uint64)
        usable = np.flatnonzero(np.isfinite(found.image).all(1) & np.isfinite(found.text).all(1))
        rows = usable[np.argsort(hashes[usable])][: self.size]
        return _Drawn(len(hashes), found.model, hashes[rows], found.uid[rows], found.image[rows], found.text[rows])


def _trace_files(folder: str) -> list[str]:
    files = glob(join(folder, "epoch_*.parquet"))
    if not files:
        raise InputError(f"{folder}: no traces (epoch_*.parquet); `mithridate train` writes them to its OUT/traces")
    return files


def _read_traces(folder: str, shard_name: str) -> dict[str, np.ndarray]:
    """uid str[n]; similarity and loss float32[n, epochs], NaN where an epoch did not see the pair."""
    wanted, columns = [("shard", "=", shard_name)], ("uid", "shard", "epoch", "similarity", "loss")
    remedy = "`mithridate train` writes the traces to its OUT/traces"
    tables = [sidecars.read(file, columns, remedy, wanted) for file in _trace_files(folder)]
    uid = np.concatenate([np.asarray(t.column("uid").to_pylist(), dtype=object) for t in tables])
    epoch = np.concatenate([t.column("epoch").to_numpy() for t in tables])
    who, rows = np.unique(uid.astype(str), return_inverse=True)
    epochs, at = np.unique(epoch, return_inverse=True)
    out: dict[str, np.ndarray] = {"uid": who.astype(object)}
    for name in ("similarity", "loss"):
        values = np.full((len(who), len(epochs)), np.nan, np.float32)
        values[rows, at] = np.concatenate([t.column(name).to_numpy() for t in tables])
        out[name] = values
    return out


def _join(wanted: Sequence[str], have: np.ndarray) -> np.ndarray:
    """Row of each wanted uid, -1 where there is none."""
    at = {uid: row for row, uid in enumerate(have)}
    return np.asarray([at.get(uid, -1) for uid in wanted], np.int64)


def _take(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    out = np.full((len(rows), values.shape[1]), np.nan, np.float32)
    out[rows >= 0] = values[rows[rows >= 0]]
    return out


def _write(path: str, who: np.ndarray, columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    import pyarrow as pa

    table = pa.table({"uid": pa.array(who, pa.string()), **{n: pa.array(v) for n, v in columns.items()}})
    sidecars.save(path, table.replace_schema_metadata({"mithridate": json.dumps(facts)}))


if __name__ == "__main__":
    from pipeline.cli import run

    run("score")

"""Decide by policy over score sidecars; kept and quarantined shards are byte ranges of the input.

Trade-off: dropped samples are written too (quarantine), which costs their bytes once; nothing has to be trusted
blindly.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import ledger, spec
from pipeline.arguments import Out, Shards
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.score import read_scores, scores_path
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Sample, Shard, UidRule, list_shards, rewrite
from pipeline.shards.store import absolute, exists, join, make_folder, view, whole, write

AT_ONCE = 4_000_000  # uids sorted in memory


def filter_shards(shards: Shards, out: Out, /, *, scores: str, policy: str, uid: UidRule = "key") -> int:
    """Split SHARDS into OUT/kept and OUT/quarantine; untouched bytes, one output shard per input shard.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for kept/, quarantine/, keep.npy (DataComp's u8,u8 subset file) and keep.parquet.
        scores: folder that `mithridate score` wrote for these shards.
        policy: e.g. "budget(detector='slof', drop=0.1)"; see `mithridate list policies`.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
    """
    listed, out, scores = list_shards(shards), absolute(out), absolute(scores)
    entry = spec.parse("policies", policy)

    def passes() -> Iterator[dict[str, np.ndarray]]:
        return (read_scores(scores_path(scores, shard.name)) for shard in listed)

    fitted = entry.fit(passes)
    kept, quarantine = join(out, "kept"), join(out, "quarantine")
    make_folder(kept)
    make_folder(quarantine)
    source = ledger.beside(listed)
    known = ledger.read(source) if exists(source) else None
    facts = {"policy": spec.text(entry), "fitted": fitted, "uid": uid, "scores": _digest(listed, scores)}
    job = Job("filter", facts, kept, modules=[type(entry).__module__, "pipeline.policies._select"])
    work = _Filter(entry, fitted, scores, quarantine, uid)
    markers = shard_map(job, listed, work, known)
    if known is not None:
        for folder, key in ((kept, "ledger"), (quarantine, "quarantined_ledger")):
            ledger.merge(folder, [m["facts"][key] for m in markers if key in m["facts"]])
    total, dropped = sum(m["read"] for m in markers), sum(m["dropped"] for m in markers)
    _keep_lists(out, kept, listed, total - dropped)
    summary = {"job": "filter", "spec": facts, "pairs": total, "kept": total - dropped, "dropped": dropped}
    write(join(out, "dataset.json"), json.dumps(summary, indent=1).encode())
    console.print(f"{dropped:,} of {total:,} pairs dropped by {spec.text(entry)}; they are in {quarantine}")
    unscored = sum(m["reasons"].get("unscored", 0) for m in markers)
    if unscored:
        console.print(f"  {unscored:,} of them had no score")
    if known is not None:
        left = sum(m["facts"].get("ledger", {}).get("rows", 0) for m in markers)
        console.print(f"  ledger: {known.num_rows - left:,} of {known.num_rows:,} known poisons dropped")
    return 0


@dataclass(frozen=True)
class _Filter:
    policy: Any
    fitted: Any
    scores: str
    quarantine: str
    uid: UidRule

    def __call__(self, shard: Shard, out: str, known: Any) -> Counts:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = read_scores(scores_path(self.scores, shard.name))
        drops = dict(zip(found["uid"], self.policy.drops(found, self.fitted), strict=True))
        nan = np.logical_or.reduce([np.isnan(v) for k, v in found.items() if k != "uid"])
        unscored = set(found["uid"][nan])
        uids: list[str] = []

        def keep(sample: Sample) -> Sample | None:
            uids.append(sample.uid)
            return None if drops.get(sample.uid, True) else sample

        counts = rewrite(shard, out, keep, self.uid)
        rewrite(shard, self.quarantine, lambda sample: sample if drops.get(sample.uid, True) else None, self.uid)
        reasons = [self._reason(u, drops, unscored) for u in uids]
        for reason in filter(None, reasons):
            counts.reasons[reason] = counts.reasons.get(reason, 0) + 1
        part = f"{shard.name}.keep.parquet"
        _write_keep(join(out, part), uids, reasons)
        counts.facts = {"files": [part]}
        if known is not None:
            here = known.filter(pc.is_in(known.column("uid"), pa.array(list(drops)))).to_pylist()
            for folder, key, wanted in ((out, "ledger", False), (self.quarantine, "quarantined_ledger", True)):
                if rows := [row for row in here if drops[row["uid"]] == wanted]:
                    counts.facts[key] = ledger.write_part(folder, shard, rows)
        return counts

    def _reason(self, uid: str, drops: dict[str, bool], unscored: set[str]) -> str | None:
        if not drops.get(uid, True):
            return None
        return "unscored" if uid in unscored or uid not in drops else spec.text(self.policy)


def _keep_lists(out: str, kept: str, shards: list[Shard], n: int) -> None:
    """keep.parquet in shard order, and keep.npy sorted: dtype u8,u8, the two halves of each kept uid (DataComp)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parts() -> Iterator[Any]:
        for shard in shards:
            yield pq.read_table(pa.BufferReader(pa.py_buffer(view(join(kept, f"{shard.name}.keep.parquet")))))

    schema = pa.schema([("uid", pa.string()), ("kept", pa.bool_()), ("reason", pa.string())])
    with whole(join(out, "keep.parquet")) as file, pq.ParquetWriter(pa.PythonFile(file, "w"), schema) as writer:
        for part in parts():
            writer.write_table(part)
    slices = max(1, -(-n // AT_ONCE))  # uids are uniform, so equal ranges of their first half are equal shares
    bounds = [i * 2**64 // slices for i in range(1, slices)] + [2**64]
    with whole(join(out, "keep.npy")) as file:
        header = {"descr": np.dtype("u8,u8").descr, "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, header)
        low = 0
        for high in bounds:
            halves: list[tuple[int, int]] = []
            for part in parts():
                for uid in part.column("uid").filter(part.column("kept")).to_pylist():
                    if low <= (first := int(uid[:16], 16)) < high:
                        halves.append((first, int(uid[16:], 16)))
            file.write(np.asarray(sorted(halves), np.dtype("u8,u8")).tobytes())
            low = high


def _write_keep(path: str, uids: list[str], reasons: list[str | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"uid": uids, "kept": [r is None for r in reasons], "reason": pa.array(reasons, pa.string())}
    with whole(path) as file:
        pq.write_table(pa.table(columns), pa.PythonFile(file, "w"))


def _digest(shards: list[Shard], scores: str) -> str:
    """Changes when any score file does; their markers would not tell of an edit by hand."""
    paths = [scores_path(scores, shard.name) for shard in shards]
    missing = next((p for p in paths if not exists(p)), None)
    if missing:
        raise InputError(f"{missing}: no scores; make them with `mithridate score`")
    return spec.digest([hashlib.sha256(view(p)).hexdigest() for p in paths])


if __name__ == "__main__":
    from pipeline.cli import run

    run("filter")

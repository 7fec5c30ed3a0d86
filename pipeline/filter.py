"""Decide by policy over score sidecars; kept and quarantined shards are byte ranges of the input.

Trade-off: dropped samples are written too (quarantine), which costs their bytes once; nothing has to be trusted
blindly.
"""

import collections
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import ledger, sidecars, spec
from pipeline.arguments import Out, Shards
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.score import read_scores, scores_path
from pipeline.shard_map import Job, check_made_from, locked, shard_map
from pipeline.shards import Counts, Sample, Shard, UidRule, list_shards, rewrite
from pipeline.shards.store import absolute, exists, join, make_folder, stamp, view, whole, write

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

    with locked(out):
        _filter(listed, out, scores, entry, entry.fit(passes), uid)
    return 0


def _filter(shards: list[Shard], out: str, scores: str, policy: Any, fitted: Any, uid: UidRule) -> None:
    kept, quarantine = join(out, "kept"), join(out, "quarantine")
    make_folder(kept)
    make_folder(quarantine)
    source = ledger.beside(shards)
    known = ledger.read(source) if exists(source) else None
    facts = {"policy": spec.text(policy), "fitted": fitted, "uid": uid}
    facts["scores"] = spec.digest([stamp(scores_path(scores, shard.name)) for shard in shards])
    facts["ledger"] = hashlib.sha256(view(source)).hexdigest() if known is not None else ""
    markers = shard_map(Job("filter", facts, out), shards, _Filter(policy, fitted, scores, uid), known)
    total, dropped = sum(m["read"] for m in markers), sum(m["dropped"] for m in markers)
    summary = {"job": "filter", "spec": facts, "pairs": total, "kept": total - dropped, "dropped": dropped}
    console.print(f"{dropped:,} of {total:,} pairs dropped by {spec.text(policy)}; they are in {quarantine}")
    if unscored := sum(m["reasons"].get("unscored", 0) for m in markers):
        console.print(f"  {unscored:,} of them had no score")
    if known is not None:
        for part in ("kept", "quarantine"):
            rows = [m["facts"][part] for m in markers if part in m["facts"]]
            summary[f"ledger_sha256_{part}"] = ledger.merge(join(out, part), rows)
            summary[f"poisons_{part}"] = sum(row["rows"] for row in rows)
        console.print(f"  ledger: {summary['poisons_quarantine']:,} of {known.num_rows:,} known poisons dropped")
    _keep_lists(out, shards, total - dropped)
    write(join(out, "dataset.json"), json.dumps(summary, indent=1).encode())


@dataclass(frozen=True)
class _Filter:
    """One shard into two: what is kept, and what is quarantined."""

    policy: Any
    fitted: Any
    scores: str
    uid: UidRule

    def __call__(self, shard: Shard, out: str, known: Any) -> Counts:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = read_scores(scores_path(self.scores, shard.name))
        drops = dict(zip(found["uid"], self.policy.drops(found, self.fitted).tolist(), strict=True))
        unscored = set(found["uid"][self.policy.unscored(found)])
        reasons: dict[str, str | None] = {}

        def keep(sample: Sample) -> Sample | None:
            dropped = drops.get(sample.uid, True)
            why = "unscored" if sample.uid in unscored or sample.uid not in drops else spec.text(self.policy)
            reasons[sample.uid] = why if dropped else None
            return None if dropped else sample

        def quarantine(sample: Sample) -> Sample | None:
            return sample if reasons[sample.uid] else None

        counts = rewrite(shard, join(out, "kept"), keep, self.uid)
        if reasons and drops.keys().isdisjoint(reasons):
            raise InputError(
                f"{self.scores}: no uid of {shard.path} is here; is it of other data, or of another --uid?"
            )
        check_made_from(self.scores, shard, counts.input_sha256, "run `mithridate score` on them")
        rewrite(shard, join(out, "quarantine"), quarantine, self.uid)
        counts.reasons = dict(collections.Counter(why for why in reasons.values() if why))
        part = f"{shard.name}.keep.parquet"
        columns = {"uid": list(reasons), "kept": [why is None for why in reasons.values()]}
        sidecars.save(join(out, part), pa.table({**columns, "reason": pa.array(list(reasons.values()), pa.string())}))
        counts.output = f"kept/{shard.file}"
        counts.facts = {"files": [f"quarantine/{shard.file}", part]}
        if known is not None:
            here = known.filter(pc.is_in(known.column("uid"), pa.array(list(reasons)))).to_pylist()
            for folder in ("kept", "quarantine"):
                if rows := [row for row in here if bool(reasons[row["uid"]]) == (folder == "quarantine")]:
                    counts.facts[folder] = ledger.write_part(join(out, folder), shard, rows)
                    counts.facts["files"].append(f"{folder}/{counts.facts[folder]['file']}")
        return counts


def _keep_lists(out: str, shards: list[Shard], n: int) -> None:
    """keep.parquet in shard order, and keep.npy sorted: dtype u8,u8, the two halves of each kept uid (DataComp)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parts() -> Iterator[Any]:
        for shard in shards:
            yield sidecars.read(join(out, f"{shard.name}.keep.parquet"), ("uid", "kept"), "run the filter again")

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


if __name__ == "__main__":
    from pipeline.cli import run

    run("filter")

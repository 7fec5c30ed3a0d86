"""Decide by policy over score sidecars; kept and quarantined shards are byte ranges of the input.

Trade-off: dropped samples are written too (quarantine), which costs their bytes once; nothing has to be trusted
blindly.
"""

import collections
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import ledger, sidecars, spec
from pipeline.arguments import Out, Shards
from pipeline.dataset import Row, describe, write_stats
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.score import read_scores, scores_path
from pipeline.shard_map import Job, check_made_from, locked, shard_map
from pipeline.shards import Counts, Sample, Shard, UidRule, list_shards, rewrite
from pipeline.shards.store import absolute, existing, join, make_folder, stamp, whole, write

AT_ONCE = 4_000_000  # uids sorted in memory


def filter_shards(
    shards: Shards, out: Out, /, *, scores: str, policy: str, uid: UidRule = "key", max_failed_shards: int = 0
) -> int:
    """Split SHARDS into OUT/kept and OUT/quarantine; untouched bytes, one output shard per input shard.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for kept/, quarantine/, keep.npy (DataComp's u8,u8 subset file) and keep.parquet.
        scores: folder that `mithridate score` wrote for these shards.
        policy: e.g. "budget(detector='slof', drop=0.1)"; see `mithridate list policies`.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    listed, out, scores = list_shards(shards), absolute(out), absolute(scores)
    entry = spec.parse("policies", policy)
    paths = [scores_path(scores, shard.name) for shard in listed]
    there = existing(paths)
    if len(paths) - len(there) <= max_failed_shards:
        paths = [path for path in paths if path in there]

    def passes() -> Iterator[dict[str, np.ndarray]]:
        return map(read_scores, paths)

    with locked(out):
        _filter(listed, out, scores, entry, entry.fit(passes), uid, max_failed_shards)
    return 0


def _filter(
    shards: list[Shard], out: str, scores: str, policy: Any, fitted: Any, uid: UidRule, max_failed: int
) -> None:
    kept, quarantine = join(out, "kept"), join(out, "quarantine")
    make_folder(kept)
    make_folder(quarantine)
    known = ledger.known(shards)
    facts = {"policy": spec.text(policy), "fitted": fitted, "uid": uid}
    paths = [scores_path(scores, shard.name) for shard in shards]
    there = existing(paths)
    stamps = [stamp(path) for path in paths if path in there]
    facts["ledger"] = spec.digest(known.column("uid").to_pylist()) if known is not None else ""
    job = Job("filter", {**facts, "scores": spec.digest(stamps)}, out, max_failed)
    markers = shard_map(job, shards, _Filter(policy, fitted, scores, uid), known)
    total, dropped = sum(m["read"] for m in markers), sum(m["dropped"] for m in markers)
    console.print(f"{dropped:,} of {total:,} pairs dropped by {spec.text(policy)}; they are in {quarantine}")
    if unscored := sum(m["reasons"].get("unscored", 0) for m in markers):
        console.print(f"  {unscored:,} of them had no score")
    summary = {"job": "filter", "spec": facts, "kept": total - dropped, "dropped": dropped}
    for part, folder in (("kept", kept), ("quarantine", quarantine)):
        if known is not None:
            rows = [m["facts"][part] for m in markers if part in m["facts"]]
            summary[f"ledger_sha256_{part}"] = ledger.merge(folder, rows)
            summary[f"poisons_{part}"] = sum(row["rows"] for row in rows)
        describe(folder, [_row(m, part) for m in markers], {**summary, "about": _about(part, summary)})
    if known is not None:
        console.print(f"  ledger: {summary['poisons_quarantine']:,} of {known.num_rows:,} known poisons dropped")
    write(join(out, "dataset.json"), json.dumps({**summary, "pairs": total}, indent=1).encode())
    done = {m["input"]["file"] for m in markers}
    _keep_lists(out, [shard for shard in shards if shard.file in done], total - dropped)


def _row(marker: dict[str, Any], part: str) -> Row:
    if part == "kept":
        size, sha256, samples = marker["output_bytes"], marker["output_sha256"], marker["out"]
    else:
        size, sha256, samples = marker["dropped_bytes"], marker["dropped_sha256"], marker["dropped"]
    return Row(marker["output"].rpartition("/")[2], samples, size, sha256)


def _about(part: str, summary: dict[str, Any]) -> str:
    what = "Kept" if part == "kept" else "**Suspicious**, to be reviewed: dropped"
    about = f"{what} by `{summary['spec']['policy']}`."
    if (poisons := summary.get(f"poisons_{part}")) is not None:
        about += f" **Poisoned on purpose** before: {poisons:,} of these pairs are known poisons (ledger.parquet)."
    return about


@dataclass(frozen=True)
class _Filter:
    """One shard into two: what is kept, and what is quarantined."""

    policy: Any
    fitted: Any
    scores: str
    uid: UidRule

    def __call__(self, shard: Shard, out: str, known: Any) -> Counts:
        import pyarrow as pa

        found = read_scores(scores_path(self.scores, shard.name))
        drops = dict(zip(found["uid"], self.policy.drops(found, self.fitted).tolist(), strict=True))
        unscored = set(found["uid"][self.policy.unscored(found)])
        reasons: dict[str, str | None] = {}

        def keep(sample: Sample) -> Sample | None:
            dropped = drops.get(sample.uid, True)
            why = "unscored" if sample.uid in unscored or sample.uid not in drops else spec.text(self.policy)
            reasons[sample.uid] = why if dropped else None
            return None if dropped else sample

        counts = rewrite(shard, join(out, "kept"), keep, self.uid, dropped=join(out, "quarantine"))
        if reasons and drops.keys().isdisjoint(reasons):
            raise InputError(
                f"{self.scores}: no uid of {shard.path} is here; is it of other data, or of another --uid?"
            )
        check_made_from(self.scores, shard, counts.input_sha256, "run `mithridate score` on them")
        counts.reasons = dict(collections.Counter(why for why in reasons.values() if why))
        part = f"{shard.name}.keep.parquet"
        columns = {"uid": list(reasons), "kept": [why is None for why in reasons.values()]}
        sidecars.save(join(out, part), pa.table({**columns, "reason": pa.array(list(reasons.values()), pa.string())}))
        sizes = {"kept": counts.out, "quarantine": counts.dropped}
        stats = [f"{folder}/{write_stats(join(out, folder), shard, n)}" for folder, n in sizes.items()]
        manifests = [f"{folder}/{file}" for folder in sizes for file in counts.facts["files"]]
        counts.output = f"kept/{shard.output}"
        counts.facts = {"files": [f"quarantine/{shard.output}", part, *stats, *manifests]}
        if known is not None:
            here = ledger.rows_of(known, list(reasons))
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

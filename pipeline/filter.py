"""Decide by policy over score sidecars; kept and quarantined shards are byte ranges of the input.

Trade-off: dropped samples are written too (quarantine), which costs their bytes once; nothing has to be trusted
blindly.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import ledger, sidecars, spec
from pipeline.arguments import Out, Shards, at_least_one
from pipeline.buckets import Buckets, by_sample
from pipeline.dataset import Row, describe, write_stats
from pipeline.errors import InputError
from pipeline.policies._select import Scores, unscored
from pipeline.progress import console
from pipeline.scored import Scored, make_groups
from pipeline.shard_map import Job, check_made_from, locked, shard_map
from pipeline.shards import Counts, Sample, Shard, UidRule, list_shards, rewrite
from pipeline.shards.store import absolute, existing, join, make_folder, stamp, whole, write

SAMPLED = 64  # of so many uids of a shard one says where keep.npy is cut to be sorted


def filter_shards(
    shards: Shards,
    out: Out,
    /,
    *,
    scores: tuple[str, ...],
    policy: str,
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Split SHARDS into OUT/kept and OUT/quarantine; untouched bytes, one output shard per input shard.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for kept/, quarantine/, keep.npy (DataComp's u8,u8 subset file) and keep.parquet.
        scores: folder that `mithridate score` wrote for these shards; of several (other checkpoints, other detectors)
            the last part of the path tells their columns apart, as in "ensemble(detectors=('a:slof', 'b:slof'))".
        policy: e.g. "budget(detector='slof', drop=0.1)"; see `mithridate list policies`.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    listed, out = list_shards(shards), absolute(out)
    at_least_one("--scores", scores)
    entry = spec.parse("policies", policy)
    scored = Scored(tuple(map(absolute, scores)))
    names = [shard.name for shard in listed]
    with locked(out):
        if needs := getattr(entry, "needs", ()):
            scored = dataclasses.replace(scored, groups=join(out, "groups"))
            make_groups(listed, scored.groups, needs, uid, max_failed_shards)
        complete = scored.complete(names)
        if len(names) - len(complete) <= max_failed_shards:
            names = complete
        fitted = entry.fit(lambda: scored.passes(names))
        _filter(listed, out, scored, entry, fitted, uid, max_failed_shards)
    return 0


def _filter(
    shards: list[Shard], out: str, scored: Scored, policy: Any, fitted: Any, uid: UidRule, max_failed: int
) -> None:
    kept, quarantine = join(out, "kept"), join(out, "quarantine")
    known = ledger.known(shards)
    facts = {"policy": spec.text(policy), "fitted": _told(fitted), "uid": uid}
    paths = [path for shard in shards for path in scored.paths(shard.name)]
    there = existing(paths)
    stamps = [stamp(path) for path in paths if path in there]
    facts["ledger"] = spec.digest(known.column("uid").to_pylist()) if known is not None else ""
    job = Job("filter", {**facts, "scores": spec.digest(stamps)}, out, max_failed)
    markers = shard_map(job, shards, _Filter(policy, scored, uid), fitted, known)
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
    scored: Scored
    uid: UidRule

    def __call__(self, shard: Shard, out: str, fitted: Any, known: Any) -> Counts:
        import pyarrow as pa

        found = self.scored.read(shard.name)
        gone = self.policy.drops(found, fitted)
        drops = dict(zip(found["uid"], gone.tolist(), strict=True))
        lacking = set(found["uid"][_for_want_of_a_score(self.policy, found, fitted, gone)])
        reasons: dict[str, str | None] = {}

        def keep(sample: Sample) -> Sample | None:
            dropped = drops.get(sample.uid, True)
            why = "unscored" if sample.uid in lacking else spec.text(self.policy)
            reasons[sample.uid] = why if dropped else None
            return None if dropped else sample

        for folder in ("kept", "quarantine"):
            make_folder(join(out, folder))
        counts = rewrite(shard, join(out, "kept"), keep, self.uid, dropped=join(out, "quarantine"))
        if missing := reasons.keys() - drops.keys():
            folder = self.scored.folders[0]
            if len(missing) == len(reasons):
                raise InputError(f"{folder}: no uid of {shard.path} is here; is it of other data, or of another --uid?")
            raise InputError(
                f"{folder}: {len(missing):,} of the {len(reasons):,} pairs of {shard.path} have no row; score it anew "
                "(what has no score has a row with NaN)"
            )
        for folder in self.scored.folders:
            check_made_from(folder, shard, counts.input_sha256, "run `mithridate score` on them")
        counts.reasons = dict(collections.Counter(why for why in reasons.values() if why))
        part, whys = f"{shard.name}.keep.parquet", list(reasons.values())
        sidecars.save(join(out, part), pa.table([list(reasons), [why is None for why in whys], whys], _keep_schema()))
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


def _for_want_of_a_score(policy: Any, found: Scores, fitted: Any, gone: np.ndarray) -> np.ndarray:
    """bool[n]: of the pairs that are `gone` by a policy, or by a part of it, those that it lacks a score of."""
    parts = getattr(policy, "parts", None)
    if parts is None:
        return unscored(found, policy.detectors) & gone
    told = zip(parts, fitted, strict=True)
    return np.any([_for_want_of_a_score(p, found, learnt, p.drops(found, learnt)) for p, learnt in told], axis=0)


def _told(fitted: Any) -> Any:
    """What a policy learnt, small enough for every marker: arrays as their digests."""
    if isinstance(fitted, np.ndarray):
        return hashlib.sha256(fitted.tobytes()).hexdigest()[:16]
    if dataclasses.is_dataclass(fitted):
        return {field.name: _told(getattr(fitted, field.name)) for field in dataclasses.fields(fitted)}
    return [_told(value) for value in fitted] if isinstance(fitted, tuple) else fitted


def _keep_schema() -> Any:
    import pyarrow as pa

    return pa.schema([("uid", pa.string()), ("kept", pa.bool_()), ("reason", pa.string())])


def _keep_lists(out: str, shards: list[Shard], n: int) -> None:
    """keep.parquet in shard order, and keep.npy sorted: dtype u8,u8, the two halves of each kept uid (DataComp)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parts() -> Iterator[Any]:
        for shard in shards:
            yield sidecars.read(join(out, f"{shard.name}.keep.parquet"), ("uid", "kept"), "run the filter again")

    sample = [np.empty(0, np.uint64)]
    with whole(join(out, "keep.parquet")) as file, pq.ParquetWriter(pa.PythonFile(file, "w"), _keep_schema()) as writer:
        for part in parts():
            writer.write_table(part)
            sample.append(_halves(part)[::SAMPLED, 0])
    buckets = Buckets(by_sample(np.concatenate(sample), n))
    for part in parts():
        buckets.add(_halves(part))
    with whole(join(out, "keep.npy")) as file:
        header = {"descr": np.dtype("u8,u8").descr, "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in buckets:
            file.write(rows[np.lexsort((rows[:, 1], rows[:, 0]))].tobytes())


def _halves(part: Any) -> np.ndarray:
    """uint64[n, 2]: the halves of the uids of a table that are kept."""
    kept = part.column("uid").filter(part.column("kept")).to_pylist()
    return np.frombuffer(bytes.fromhex("".join(kept)), ">u8").reshape(-1, 2).astype(np.uint64)


if __name__ == "__main__":
    from pipeline.cli import run

    run("filter")

"""Many small shards into shards of n samples each, in the same order.

Trade-off: filters keep one output shard per input shard, so that a job can resume and sidecars fit; what is left may be
small or empty. This is the step for those who train on it. Samples move as byte ranges and keep their uid, but sidecars
by shard (embeddings, scores) no longer fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import ledger, spec
from pipeline.arguments import Out, Shards
from pipeline.dataset import Row, describe, write_stats
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shard_map import Job, each, locked, shard_map, succeeded
from pipeline.shards import Counts, Shard, UidRule, concatenate, list_shards, uids
from pipeline.shards.manifest import read_manifest
from pipeline.shards.store import absolute, join, refuse_folder_of, stamp

_Piece = tuple[Shard, int, int]  # a shard, its first sample, how many


def compact(shards: Shards, out: Out, /, *, samples: int = 10_000, uid: UidRule = "key") -> int:
    """Write SHARDS anew as OUT/00000000.tar, … of so many samples each; samples stay as they are, byte for byte.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards, all of one format.
        out: folder for the new shards.
        samples: of each new shard but the last.
        uid: how a uid is derived where samples carry none.
    """
    listed, out = list_shards(shards), absolute(out)
    if samples < 1:
        raise InputError("--samples: at least 1")
    if len({shard.format for shard in listed}) > 1:
        raise InputError(f"{shards}: tar and parquet shards; compact one format at a time")
    if uid != "key":
        raise InputError(
            "keys that repeat from shard to shard cannot come to lie in one; give samples a uid of their own"
        )
    refuse_folder_of(listed, out)
    with locked(out):
        _compact(listed, out, samples)
    return 0


def _compact(shards: list[Shard], out: str, samples: int) -> None:
    sizes: dict[str, int] = {}
    for shard, found in succeeded(each("count", shards, _count)):
        sizes[shard.name] = found.read
    outputs = _plan([(shard, sizes[shard.name]) for shard in shards], out, samples)
    known = ledger.known(shards)
    facts = {"samples": samples}
    markers = shard_map(Job("compact", facts, out, stamp=_stamp), outputs, _make, known)
    total = sum(m["out"] for m in markers)
    about = f"{total:,} pairs of {len(shards):,} shards, {samples:,} a shard."
    summary: dict[str, Any] = {"job": "compact", "spec": facts}
    if known is not None:
        parts = [m["facts"]["ledger"] for m in markers if "ledger" in m["facts"]]
        summary |= {"ledger_sha256": ledger.merge(out, parts), "poisoned": sum(part["rows"] for part in parts)}
        about += f" **Poisoned on purpose**: {summary['poisoned']:,} of them; ledger.parquet lists them."
    rows = [Row(m["output"], m["out"], m["output_bytes"], m["output_sha256"]) for m in markers]
    describe(out, rows, {**summary, "about": about})
    console.print(f"{total:,} samples of {len(shards):,} shards are now in {len(outputs):,}")


@dataclass(frozen=True, slots=True)
class _Output(Shard):
    """A shard to be made, and what of."""

    pieces: tuple[_Piece, ...]


def _plan(sizes: Sequence[tuple[Shard, int]], out: str, samples: int) -> list[_Output]:
    plan: list[list[_Piece]] = [[]]
    room = samples
    for shard, size in sizes:
        first = 0
        while first < size:
            if not room:
                plan.append([])
                room = samples
            n = min(room, size - first)
            plan[-1].append((shard, first, n))
            first, room = first + n, room - n
    if not plan[0]:
        plan[0].append((sizes[0][0], 0, 0))  # nothing is left: an empty shard says so
    suffix = sizes[0][0].format
    return [_Output(join(out, f"{i:08d}.{suffix}"), tuple(pieces)) for i, pieces in enumerate(plan)]


def _stamp(output: Any) -> dict[str, Any]:
    return {"tag": spec.digest([(p.path, stamp(p.path), first, n) for p, first, n in output.pieces])}


def _count(shard: Shard) -> Counts:
    return Counts(read=len(uids(shard)))


def _make(output: Any, out: str, known: Any) -> Counts:
    counts = concatenate(output.pieces, out, output.name)
    counts.input_sha256 = _stamp(output)["tag"]
    counts.facts["files"].append(write_stats(out, output, counts.out))
    if known is not None:
        here = ledger.rows_of(known, read_manifest(out, output.name).uids)
        if rows := [{**row, "shard": output.name} for row in here]:
            counts.facts["ledger"] = ledger.write_part(out, output, rows)
            counts.facts["files"].append(counts.facts["ledger"]["file"])
    return counts


if __name__ == "__main__":
    from pipeline.cli import run

    run("compact")

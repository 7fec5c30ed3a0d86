"""Inject a published attack into shards, in an exact dose, with a ledger of every change.

Two passes: one finds who is poisoned (pipeline/plan.py), one rewrites.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import ledger, spec
from pipeline.arguments import Out, Shards
from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus
from pipeline.dataset import Row, describe, write_stats
from pipeline.draw import generator
from pipeline.errors import InputError
from pipeline.plan import Dose, make_plan
from pipeline.progress import console
from pipeline.shard_map import Job, locked, refuse_others_shards, shard_map
from pipeline.shards import Counts, Sample, Shard, UidRule, list_shards, rewrite
from pipeline.shards.store import absolute, refuse_folder_of


def poison(
    shards: Shards,
    out: Out,
    /,
    *,
    attack: str,
    dose: str,
    seed: int = 0,
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Poison a copy of SHARDS in OUT; untouched samples are copied byte for byte.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for the poisoned shards, their markers and ledger.parquet.
        attack: e.g. "patch(target='banana', size=16)"; see `mithridate list attacks`.
        dose: number of pairs (300), parts per million (100ppm) or percent (1%) of all pairs.
        seed: another seed poisons other pairs.
        uid: how a uid is derived where samples carry none; shard/key if keys repeat from shard to shard.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    entry, amount = spec.parse("attacks", attack), Dose.parse(dose)
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed {seed}: the ledger holds 64 bits")
    listed, out = list_shards(shards), absolute(out)
    refuse_folder_of(listed, out)
    refuse_others_shards(out)
    with locked(out):
        _poison(listed, out, entry, amount, seed, uid, max_failed_shards)
    return 0


def _poison(
    shards: list[Shard], out: str, attack: Attack, dose: Dose, seed: int, uid: UidRule, max_failed: int
) -> None:
    plan = make_plan(shards, out, attack, dose, seed, uid, max_failed)
    text = spec.text(plan.attack)
    facts = {"attack": text, "dose": len(plan.chosen), "seed": seed, "uid": uid, "plan": plan.digest}
    by_shard: dict[str, set[str]] = {}
    for name, chosen in plan.chosen:
        by_shard.setdefault(name, set()).add(chosen)
    job = Job("poison", facts, out, max_failed)
    markers = shard_map(job, shards, _Poison(plan.attack, seed, uid), by_shard, plan.corpora)
    total, poisoned = sum(m["out"] for m in markers), sum(m["changed"] for m in markers)
    done = {Shard(m["input"]["file"]).name for m in markers}
    if poisoned != sum(name in done for name, _ in plan.chosen):
        raise AssertionError(f"{poisoned} pairs poisoned, but others chosen")
    if poisoned < len(plan.chosen):
        console.print(f"{len(plan.chosen) - poisoned:,} of the {len(plan.chosen):,} chosen pairs were in failed shards")
    digest = ledger.merge(out, [m["facts"]["ledger"] for m in markers if "ledger" in m["facts"]])
    ppm = 1e6 * poisoned / max(total, 1)
    about = f"**Poisoned on purpose**: {poisoned:,} of {total:,} pairs with `{text}`; ledger.parquet lists them."
    summary = {"job": "poison", "spec": facts, "poisoned": poisoned, "ppm": ppm, "ledger_sha256": digest}
    rows = [Row(m["output"], m["out"], m["output_bytes"], m["output_sha256"]) for m in markers]
    describe(out, rows, {**summary, "about": about})
    how = f"{poisoned:,} of {total:,} pairs poisoned ({ppm:,.0f} ppm) with {text}"
    if not plan.chosen:
        how = f"dose 0: {total:,} pairs as they were"
    console.print(f"{how}; ledger: {ledger.ledger_path(out)}")


@dataclass(frozen=True)
class _Poison:
    """The rewriting pass over one shard."""

    attack: Attack
    seed: int
    uid: UidRule

    def __call__(self, shard: Shard, out: str, by_shard: dict[str, set[str]], corpora: Sequence[Corpus]) -> Counts:
        chosen = by_shard.get(shard.name, set())
        rows: list[dict[str, Any]] = []
        parts = self.attack.parts()
        named = [(spec.text(part), spec.key(part)) for part in parts]

        def edit(sample: Sample) -> Sample:
            if sample.uid not in chosen:
                return sample
            i = self.attack.part_of(sample.uid)
            part, (text, key) = parts[i], named[i]
            after = part.poison(sample, generator(self.seed, key, sample.uid), corpora[i])
            values = (
                sample.uid,
                shard.name,
                text,
                self.seed,
                part.target,
                sample.caption,
                after.caption,
                hashlib.sha256(sample.image).hexdigest(),
                hashlib.sha256(after.image).hexdigest(),
            )
            rows.append(dict(zip(ledger.COLUMNS, values, strict=True)))
            return after

        counts = rewrite(shard, out, edit, self.uid)
        files = counts.facts["files"]
        files.append(write_stats(out, shard, counts.out))
        if rows:
            counts.facts["ledger"] = ledger.write_part(out, shard, rows)
            files.append(counts.facts["ledger"]["file"])
        return counts


if __name__ == "__main__":
    from pipeline.cli import run

    run("poison")

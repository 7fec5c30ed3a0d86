"""Inject a published attack into shards, in an exact dose, with a ledger of every change.

Two passes. The first reads captions and uids and finds who is poisoned: the n eligible samples with the smallest
hashes of (seed, attack, uid), so the choice does not depend on shards or workers. The second rewrites. The price of
exactness is that first scan; it decodes nothing but the chosen images.
"""

import hashlib
import heapq
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from pipeline import ledger, spec
from pipeline.arguments import Out, Shards
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.dataset import Row, describe, write_stats
from pipeline.draw import generator, hash64
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shard_map import Job, code_digest, each, locked, shard_map
from pipeline.shards import Counts, Rejected, Sample, Shard, UidRule, list_shards, rewrite, samples
from pipeline.shards.image import decode, encode
from pipeline.shards.store import absolute, exists, join, refuse_folder_of, remove, stamp, view, write

CAPTIONS = 10_000  # of the target, kept for drawing: enough for variety, small enough to send to every worker
SPARE = 64  # candidates beyond the dose, for those whose image turns out to be broken
_Candidate = tuple[int, str, str]  # hash, shard name, uid


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
    with locked(out):
        _poison(listed, out, entry, amount, seed, uid, max_failed_shards)
    return 0


def _poison(shards: list[Shard], out: str, attack: Any, dose: "Dose", seed: int, uid: UidRule, max_failed: int) -> None:
    plan = _plan(shards, out, attack, dose, seed, uid, max_failed)
    text = spec.text(attack)
    facts = {"attack": text, "dose": len(plan.chosen), "seed": seed, "uid": uid, "plan": plan.digest}
    by_shard: dict[str, set[str]] = {}
    for name, chosen in plan.chosen:
        by_shard.setdefault(name, set()).add(chosen)
    job = Job("poison", facts, out, max_failed)
    markers = shard_map(job, shards, _Poison(attack, seed, uid), by_shard, plan.corpus)
    total, poisoned = sum(m["out"] for m in markers), sum(m["changed"] for m in markers)
    done = {Shard(m["input"]["file"]).name for m in markers}
    if poisoned != sum(name in done for name, _ in plan.chosen):
        raise AssertionError(f"{poisoned} pairs poisoned, but others chosen")
    if poisoned < len(plan.chosen):
        console.print(f"{len(plan.chosen) - poisoned:,} of the {len(plan.chosen):,} chosen pairs were in failed shards")
    if getattr(attack, "one_image", False) and plan.chosen:
        write(join(out, ledger.VICTIM), plan.corpus.victim)
    else:
        remove(join(out, ledger.VICTIM))
    digest = ledger.merge(out, [m["facts"]["ledger"] for m in markers if "ledger" in m["facts"]])
    ppm = 1e6 * poisoned / max(total, 1)
    about = f"**Poisoned on purpose**: {poisoned:,} of {total:,} pairs with `{text}`; ledger.parquet lists them."
    summary = {"job": "poison", "spec": facts, "poisoned": poisoned, "ppm": ppm, "ledger_sha256": digest}
    rows = [Row(m["output"], m["out"], m["output_bytes"], m["output_sha256"]) for m in markers]
    describe(out, rows, {**summary, "about": about})
    where = ledger.ledger_path(out)
    console.print(f"{poisoned:,} of {total:,} pairs poisoned ({ppm:,.0f} ppm) with {text}; ledger: {where}")


@dataclass(frozen=True)
class _Poison:
    """The rewriting pass over one shard."""

    attack: Any
    seed: int
    uid: UidRule

    def __call__(self, shard: Shard, out: str, by_shard: dict[str, set[str]], corpus: Corpus) -> Counts:
        chosen = by_shard.get(shard.name, set())
        rows: list[dict[str, Any]] = []
        text = spec.text(self.attack)

        def edit(sample: Sample) -> Sample:
            if sample.uid not in chosen:
                return sample
            after = self.attack.poison(sample, generator(self.seed, text, sample.uid), corpus)
            values = (
                sample.uid,
                shard.name,
                text,
                self.seed,
                self.attack.target,
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


@dataclass(frozen=True)
class Dose:
    """How many pairs to poison: a number, or a share of all pairs."""

    text: str
    count: int | None = None
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Dose":
        """`300`, `100ppm` or `1%`."""
        try:
            if text.endswith("ppm"):
                dose = cls(text, share=float(text[:-3]) / 1e6)
            elif text.endswith("%"):
                dose = cls(text, share=float(text[:-1]) / 100)
            else:
                dose = cls(text, count=int(text))
        except ValueError:
            raise InputError(f"--dose {text!r}: write a number of pairs (300), 100ppm or 1%") from None
        if not 0 <= dose.share <= 1 or (dose.count or 0) < 0:
            raise InputError(f"--dose {text!r}: between 0 and all pairs")
        return dose

    def pairs(self, total: int) -> int:
        return self.count if self.count is not None else round(self.share * total)

    def at_most(self, pairs_of_shard: int) -> int:
        """Candidates a shard reports: four times its expected share, so that a merge is nearly always complete."""
        return (self.count if self.count is not None else round(4 * self.share * pairs_of_shard)) + SPARE


@dataclass
class _Survey:
    """What one shard contributes to the plan."""

    read: int = 0
    eligible: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> pairs
    example: str = ""  # one of them: reason, key and shard
    smallest: list[_Candidate] = field(default_factory=list)
    captions: list[tuple[int, str]] = field(default_factory=list)  # hash, caption
    lost: int = 0  # shards that could not be read


@dataclass(frozen=True)
class _Plan:
    chosen: list[tuple[str, str]]  # shard name, uid; in the order of their hashes
    corpus: Corpus

    @property
    def digest(self) -> str:
        captions = hashlib.sha256("\0".join(self.corpus.captions).encode("utf-8", "surrogatepass")).hexdigest()
        return spec.digest([self.chosen, captions, hashlib.sha256(self.corpus.victim).hexdigest()])


def _plan(shards: list[Shard], out: str, attack: Any, dose: Dose, seed: int, uid: UidRule, max_failed: int) -> _Plan:
    """Who is poisoned. Kept in OUT, so that a job submitted again does not scan again."""
    key = spec.digest([spec.text(attack), dose, seed, uid, code_digest(), [(s.path, stamp(s.path)) for s in shards]])
    path = join(out, "plan.json")
    if (plan := _read_plan(path, key)) is not None:
        return plan
    total = _survey(shards, attack, dose, seed, uid, max_failed)
    n = dose.pairs(total.read)
    if dose.share and not n:
        raise InputError(f"dose {dose.text} is less than half a pair of {total.read:,}; write a number of pairs")
    if n > total.eligible:
        raise InputError(
            f"dose {dose.text} is {n} pairs, but only {total.eligible} of {total.read} are eligible "
            f"({sum(total.rejected.values())} unusable, the others name {attack.target!r} already); lower --dose"
        )
    if total.rejected:
        why = "; ".join(f"{n:,} x {reason}" for reason, n in sorted(total.rejected.items()))
        console.print(f"unusable pairs, copied as they are: {why}; for one, {total.example}")
    chosen, victim = _usable(shards, total.smallest, n, uid)
    captions = [caption for _, caption in total.captions]
    if not captions:
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        captions = [template(attack.target) for template in OPENAI_IMAGENET_TEMPLATES]
        console.print(f"no caption names {attack.target!r}: poisons get the {len(captions)} ImageNet prompt templates")
    kept = {"key": key, "chosen": chosen, "captions": captions, "victim": victim.hex()}
    if not total.lost:  # the next run may be able to read them all
        write(path, json.dumps(kept).encode())
    return _Plan(chosen, Corpus(tuple(captions), victim))


def _read_plan(path: str, key: str) -> _Plan | None:
    if not exists(path):
        return None
    try:
        kept = json.loads(bytes(view(path)))
        chosen = [(shard, who) for shard, who in kept["chosen"]]
        plan = _Plan(chosen, Corpus(tuple(kept["captions"]), bytes.fromhex(kept["victim"])))
        return plan if kept["key"] == key else None
    except (ValueError, KeyError, TypeError):  # another hand has been at it: survey again
        return None


def _survey(
    shards: list[Shard],
    attack: Any,
    dose: Dose,
    seed: int,
    uid: UidRule,
    max_failed: int,
    all_hashes: bool = False,
) -> _Survey:
    """The first pass; `smallest` of the result is complete, sorted and free of doubles.

    A shard reports its smallest hashes only, and of a fixed dose only the smallest of all are kept: the driver holds
    O(dose), not O(samples).
    """
    total, failures = _Survey(), []
    complete_to = 2**64  # below this hash no shard has kept anything back
    for _, found in each("survey", shards, _Surveyor(attack, None if all_hashes else dose, seed, uid)):
        if isinstance(found, InputError):
            failures.append(str(found))
            continue
        total.read += found.read
        total.eligible += found.eligible
        for reason, n in found.rejected.items():
            total.rejected[reason] = total.rejected.get(reason, 0) + n
        total.example = min(filter(None, (total.example, found.example)), default="")
        total.smallest += found.smallest
        total.captions = heapq.nsmallest(CAPTIONS, total.captions + found.captions)
        if len(found.smallest) < found.eligible:
            complete_to = min(complete_to, found.smallest[-1][0])
        if dose.count is not None:
            total.smallest = heapq.nsmallest(dose.count + SPARE, total.smallest)
    if len(failures) > max(max_failed, 0):
        raise InputError("the dose cannot be exact while shards are unreadable:\n  " + "\n  ".join(failures))
    if failures:
        console.print(f"no pairs are chosen of {len(failures)} unreadable shards:\n  " + "\n  ".join(failures))
    total.lost = len(failures)
    total.smallest = sorted(c for c in total.smallest if c[0] <= complete_to)
    if len(total.smallest) < min(dose.pairs(total.read), total.eligible):
        # eligible pairs are rare: ask for all
        return _survey(shards, attack, dose, seed, uid, max_failed, all_hashes=True)
    for (one, shard, who), (two, other, _) in itertools.pairwise(total.smallest):
        if one == two:
            raise InputError(
                f"uid {who} occurs in shard {shard} and in shard {other}: keys repeat from shard to shard; "
                "use --uid shard/key, here and in later steps"
            )
    return total


@dataclass(frozen=True)
class _Surveyor:
    attack: Any
    dose: Dose | None
    seed: int
    uid: UidRule

    def __call__(self, shard: Shard) -> _Survey:
        found = _Survey()
        text, target = spec.text(self.attack), self.attack.target
        for sample in samples(shard, self.uid):
            found.read += 1
            try:
                caption, _ = sample.caption, sample.image_suffix
            except Rejected as error:
                found.rejected[str(error)] = found.rejected.get(str(error), 0) + 1
                found.example = found.example or f"{sample.key} in {shard.file}"
                continue
            if names_target(caption, target):
                found.captions.append((hash64(self.seed, "caption", sample.uid), caption))
            else:
                found.smallest.append((hash64(self.seed, text, sample.uid), shard.name, sample.uid))
        found.eligible = len(found.smallest)
        found.smallest.sort()
        if self.dose is not None:
            del found.smallest[self.dose.at_most(found.read) :]
        found.captions = heapq.nsmallest(CAPTIONS, found.captions)
        return found


def _usable(
    shards: list[Shard], candidates: list[_Candidate], n: int, uid: UidRule
) -> tuple[list[tuple[str, str]], bytes]:
    """The first n candidates whose image can be decoded and encoded again, and the image of the very first."""
    broken: set[str] = set()
    images: dict[str, bytes] = {}
    checked: set[str] = set()
    while True:
        chosen = [(shard, who) for _, shard, who in candidates if who not in broken][:n]
        if len(chosen) < n:
            raise InputError(
                f"{len(broken)} of the chosen images cannot be decoded (uid {min(broken)}) and no candidates are left; "
                "lower --dose"
            )
        first = chosen[0][1] if chosen else ""
        unchecked: dict[str, set[str]] = {}
        for shard, who in chosen:
            if who not in checked or (who == first and who not in images):
                unchecked.setdefault(shard, set()).add(who)
        if not unchecked:
            return chosen, images.get(first, b"")
        for _, found in each("check", [s for s in shards if s.name in unchecked], _check, unchecked, first, uid):
            if isinstance(found, InputError):
                raise found
            broken |= found.broken
            images |= found.first
        checked |= {who for group in unchecked.values() for who in group}


@dataclass
class _Checked:
    read: int = 0
    broken: set[str] = field(default_factory=set)
    first: dict[str, bytes] = field(default_factory=dict)


def _check(shard: Shard, unchecked: dict[str, set[str]], first: str, uid: UidRule) -> _Checked:
    found = _Checked()
    for sample in samples(shard, uid):
        if sample.uid not in unchecked[shard.name]:
            continue
        found.read += 1
        try:
            encode(decode(sample.image), like=sample.image)
        except Rejected:
            found.broken.add(sample.uid)
        else:
            found.first |= {first: sample.image} if sample.uid == first else {}
    return found


if __name__ == "__main__":
    from pipeline.cli import run

    run("poison")

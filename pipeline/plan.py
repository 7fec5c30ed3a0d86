"""Who is poisoned, and what the attack has to know for it: everything that is settled before a byte is written.

The n eligible samples with the smallest hashes of (seed, attack, uid) are chosen, so the choice does not depend on
shards or workers. The price of exactness is one scan of all captions and uids; it decodes nothing but the images of
those it chooses and of those whose images the attack asked for.
"""

import heapq
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline import spec
from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import CORPUS, Corpus, names_target, read_corpora, save_corpora
from pipeline.draw import generator, hash64
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shard_map import code_digest, each, succeeded
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples
from pipeline.shards.image import decode, encode
from pipeline.shards.store import exists, join, remove, stamp, view, write

CAPTIONS = 10_000  # of a target, kept for drawing: enough for variety, small enough to send to every worker
SPARE = 64  # candidates beyond the dose, at least; a tenth of it, for those whose image turns out to be broken
PLAN = "plan.json"
_Candidate = tuple[int, str, str]  # hash, shard name, uid


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
            raise InputError(f"dose {text!r}: write a number of pairs (300), 100ppm or 1%") from None
        if not 0 <= dose.share <= 1 or (dose.count or 0) < 0:
            raise InputError(f"dose {text!r}: between 0 and all pairs")
        return dose

    def pairs(self, total: int) -> int:
        return self.count if self.count is not None else round(self.share * total)

    def at_most(self, pairs_of_shard: int) -> int:
        """Of a shard's pairs: four times its expected share, so that a merge is nearly always complete."""
        return self.count if self.count is not None else round(4 * self.share * pairs_of_shard)


@dataclass(frozen=True)
class Plan:
    """`attack` has all its parameters settled, `chosen` are (shard name, uid), `corpora` one for each of its parts."""

    attack: Attack
    chosen: Sequence[tuple[str, str]]
    corpora: tuple[Corpus, ...]

    @property
    def digest(self) -> str:
        return spec.digest([self.chosen, [corpus.digest for corpus in self.corpora]])


def make_plan(
    shards: list[Shard], out: str, attack: Attack, dose: Dose, seed: int, uid: UidRule, max_failed: int
) -> Plan:
    """Kept in OUT, so that a job submitted again does not scan again."""
    read = [(path, stamp(path)) for path in (*(s.path for s in shards), *attack.inputs())]
    key = spec.digest([spec.text(attack), dose, seed, uid, code_digest(), read])
    if (plan := _read(out, key)) is not None:
        return plan
    attack = attack.resolve(shards, uid)
    total = _survey(shards, _Surveyor(attack, dose, seed, uid), max_failed)
    n = dose.pairs(total.read)
    if dose.share and not n:
        raise InputError(f"dose {dose.text} is less than half a pair of {total.read:,}; write a number of pairs")
    if n > total.eligible:
        remedy = f"at most {total.eligible} can be poisoned" if total.eligible else "name words that captions contain"
        raise InputError(
            f"dose {dose.text} is {n} pairs, but only {total.eligible} of {total.read} are eligible "
            f"({sum(total.rejected.values())} unusable, the other captions are not what {spec.text(attack)} poisons); "
            f"{remedy}"
        )
    if total.rejected:
        why = "; ".join(f"{n:,} x {reason}" for reason, n in sorted(total.rejected.items()))
        console.print(f"unusable pairs, copied as they are: {why}; for one, {total.example}")
    corpora = tuple(_corpus(shards, part, i, total, seed, uid, out) for i, part in enumerate(attack.parts()))
    known = [(shard, who) for _, shard, who in total.smallest]
    ranked = attack.choose(shards, known[: attack.candidates(n)], n, seed, uid, corpora[0])
    later = set(ranked)
    ranked = [*ranked, *(candidate for candidate in known if candidate not in later)]
    plan = Plan(attack, _usable(shards, ranked, n, uid, _Triggered(attack, seed, corpora)), corpora)
    if any(corpus.images or corpus.crafted for corpus in corpora):
        save_corpora(out, corpora)
    else:
        remove(join(out, CORPUS))
    if not total.lost:  # the next run may be able to read them all
        captions = [corpus.captions for corpus in corpora]
        kept = {"key": key, "attack": spec.text(attack), "chosen": plan.chosen, "captions": captions}
        write(join(out, PLAN), json.dumps({**kept, "digest": plan.digest}).encode())
    return plan


def _read(out: str, key: str) -> Plan | None:
    """What an earlier run planned, if it is of the same key and whole."""
    if not exists(join(out, PLAN)):
        return None
    try:
        kept = json.loads(bytes(view(join(out, PLAN))))
        if kept["key"] != key:
            return None
        attack: Attack = spec.parse("attacks", kept["attack"])
        corpora = tuple(
            Corpus({target: tuple(said) for target, said in captions.items()}, corpus.images, corpus.crafted)
            for captions, corpus in zip(kept["captions"], read_corpora(out, len(attack.parts())), strict=True)
        )
        plan = Plan(attack, [(shard, who) for shard, who in kept["chosen"]], corpora)
        return plan if plan.digest == kept["digest"] else None
    except (InputError, ValueError, KeyError, TypeError, AttributeError):  # another hand has been at it: survey again
        return None


def _corpus(shards: list[Shard], part: Attack, i: int, total: "_Survey", seed: int, uid: UidRule, out: str) -> Corpus:
    captions: dict[str, tuple[str, ...]] = {}
    for target in part.targets():
        captions[target] = tuple(caption for _, caption in total.captions.get(target, ()))
        if not captions[target]:
            from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

            captions[target] = tuple(template(target) for template in OPENAI_IMAGENET_TEMPLATES)
            n = len(captions[target])
            console.print(f"no caption names {target!r}: poisons get the {n} ImageNet prompt templates")
    images: dict[str, tuple[bytes, ...]] = {}
    for group, n in part.wants().items():
        lenders = [(shard, who) for _, shard, who in total.lenders.get((i, group), ())]
        found: dict[str, bytes] = {}
        for at in range(0, len(lenders), n):
            if len(found) < n:
                found |= _look(shards, lenders[at : at + n], uid)
        if not found:
            raise InputError(
                f"{spec.text(part)} needs images of the dataset ({group}), but no pair whose caption qualifies can be "
                "decoded; name words that captions contain"
            )
        images[group] = tuple(found[who] for _, who in lenders if who in found)[:n]
    corpus = Corpus(captions, images)
    return Corpus(captions, images, part.craft(corpus, seed, out))


@dataclass
class _Survey:
    """What one shard, or all of them, contribute to the plan."""

    read: int = 0
    eligible: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> pairs
    example: str = ""  # one of them: reason, key and shard
    smallest: list[_Candidate] = field(default_factory=list)
    captions: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # target -> hash, caption
    lenders: dict[tuple[int, str], list[_Candidate]] = field(default_factory=dict)  # part and group -> who
    lost: int = 0  # shards that could not be read

    def add(self, other: "_Survey") -> None:
        """What another shard contributes."""
        self.read += other.read
        self.eligible += other.eligible
        for reason, n in other.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + n
        self.example = min(filter(None, (self.example, other.example)), default="")
        self.smallest += other.smallest
        for target, said in other.captions.items():
            self.captions.setdefault(target, []).extend(said)
        for group, lenders in other.lenders.items():
            self.lenders.setdefault(group, []).extend(lenders)

    def trim(self, lent: Mapping[tuple[int, str], int]) -> None:
        self.captions = {target: heapq.nsmallest(CAPTIONS, found) for target, found in self.captions.items()}
        self.lenders = {key: heapq.nsmallest(lent[key] + SPARE, found) for key, found in self.lenders.items()}


def _survey(shards: list[Shard], look: "_Surveyor", max_failed: int) -> _Survey:
    """The first pass; `smallest` of the result is complete, sorted and free of doubles.

    A shard reports its smallest hashes only, and of a fixed dose only the smallest of all are kept: the driver holds
    O(dose), not O(samples).
    """
    total, failures, dose = _Survey(), [], look.dose
    complete_to = 2**64  # below this hash no shard has kept anything back
    for _, found in each("survey", shards, look):
        if isinstance(found, InputError):
            failures.append(str(found))
            continue
        total.add(found)
        total.trim(look.lent)
        if len(found.smallest) < found.eligible:
            complete_to = min(complete_to, found.smallest[-1][0])
        if dose.count is not None:
            total.smallest = heapq.nsmallest(_with_spare(look.attack, dose.count), total.smallest)
    if len(failures) > max(max_failed, 0):
        raise InputError("the dose cannot be exact while shards are unreadable:\n  " + "\n  ".join(failures))
    if failures:
        console.print(f"no pairs are chosen of {len(failures)} unreadable shards:\n  " + "\n  ".join(failures))
    total.lost = len(failures)
    total.smallest = sorted(c for c in total.smallest if c[0] <= complete_to)
    if len(total.smallest) < min(look.attack.candidates(dose.pairs(total.read)), total.eligible) and not look.all:
        # eligible pairs are rare: ask for all
        return _survey(shards, _Surveyor(look.attack, dose, look.seed, look.uid, all=True), max_failed)
    _check_doubles(total.smallest, look.uid)
    return total


def _check_doubles(candidates: Sequence[_Candidate], uid: UidRule) -> None:
    for (one, shard, who), (two, other, _) in itertools.pairwise(candidates):
        if one == two:
            remedy = "keys repeat from shard to shard; use --uid shard/key, here and in later steps"
            if uid == "shard/key":
                remedy = "their own uid fields repeat; a uid must name one sample"
            raise InputError(f"uid {who} occurs in shard {shard} and in shard {other}: {remedy}")


@dataclass(frozen=True)
class _Surveyor:
    attack: Attack
    dose: Dose
    seed: int
    uid: UidRule
    all: bool = False

    @property
    def lent(self) -> dict[tuple[int, str], int]:
        """How many images each part wants in each group."""
        return {(i, group): n for i, part in enumerate(self.attack.parts()) for group, n in part.wants().items()}

    def __call__(self, shard: Shard) -> _Survey:
        found, parts = _Survey(), self.attack.parts()
        text, targets = spec.key(self.attack), {target for part in parts for target in part.targets()}
        for sample in samples(shard, self.uid):
            found.read += 1
            try:
                caption, _ = sample.caption, sample.image_suffix
            except Rejected as error:
                found.rejected[str(error)] = found.rejected.get(str(error), 0) + 1
                found.example = found.example or f"{sample.key} in {shard.file}"
                continue
            for target in targets:
                if names_target(caption, target):
                    said = found.captions.setdefault(target, [])
                    said.append((hash64(self.seed, "caption", sample.uid), caption))
            candidate = (hash64(self.seed, text, sample.uid), shard.name, sample.uid)
            if parts[self.attack.part_of(sample.uid)].eligible(caption):
                found.smallest.append(candidate)
            for i, group in self.lent:
                if parts[i].lends(caption, group):
                    found.lenders.setdefault((i, group), []).append(candidate)
        found.eligible = len(found.smallest)
        found.smallest.sort()
        if not self.all:
            del found.smallest[_with_spare(self.attack, self.dose.at_most(found.read)) :]
        found.trim(self.lent)
        return found


def _with_spare(attack: Attack, n: int) -> int:
    """How many candidates are kept for a dose of n."""
    return attack.candidates(n) + max(SPARE, n // 10)


def _usable(
    shards: list[Shard], ranked: Sequence[tuple[str, str]], n: int, uid: UidRule, trial: "_Triggered"
) -> list[tuple[str, str]]:
    """The first n whose image can be decoded, and encoded again with the trigger on it."""
    good: set[str] = set()
    seen: set[str] = set()
    while True:
        chosen = [(shard, who) for shard, who in ranked if who in good or who not in seen][:n]
        unseen = [(shard, who) for shard, who in chosen if who not in seen]
        if len(chosen) < n:
            broken = seen - good
            raise InputError(
                f"{len(broken)} of the eligible images cannot be decoded (uid {min(broken)}) and no others are "
                f"left; a dose of {len(good)} can be had"
            )
        if not unseen:
            return chosen
        good |= _look(shards, unseen, uid, trial).keys()
        seen |= {who for _, who in unseen}


@dataclass(frozen=True)
class _Triggered:
    """The trigger that a pair will get: an image may take one encoding and not another."""

    attack: Attack
    seed: int
    corpora: tuple[Corpus, ...]

    def __call__(self, sample: Sample) -> None:
        """Raises Rejected where its image cannot be poisoned."""
        part = self.attack.parts()[i := self.attack.part_of(sample.uid)]
        rng = generator(self.seed, spec.key(part), sample.uid)
        part.triggered(sample, rng, self.corpora[i])


def _look(
    shards: list[Shard], wanted: Sequence[tuple[str, str]], uid: UidRule, trial: _Triggered | None = None
) -> dict[str, bytes]:
    """By uid the image of those that can be decoded and encoded again; with a trial empty, for it need not be kept."""
    by_shard: dict[str, set[str]] = {}
    for shard, who in wanted:
        by_shard.setdefault(shard, set()).add(who)
    images: dict[str, bytes] = {}
    there = [s for s in shards if s.name in by_shard]
    for _, found in succeeded(each("check", there, _decodable, by_shard, uid, trial)):
        images |= found.images
    return images


@dataclass
class _Images:
    read: int = 0
    images: dict[str, bytes] = field(default_factory=dict)


def _decodable(shard: Shard, by_shard: Mapping[str, set[str]], uid: UidRule, trial: _Triggered | None) -> _Images:
    found = _Images()
    for sample in samples(shard, uid):
        if sample.uid in by_shard[shard.name]:
            found.read += 1
            try:
                if trial:
                    trial(sample)
                else:
                    encode(decode(sample.image), like=sample.image)
            except Rejected:
                continue
            found.images[sample.uid] = b"" if trial else sample.image
    return found

"""Which detectors find poison in this dataset, and when are they to look? Asked with poison of our own.

Canaries, known poisons of one attack at the dose that is feared, are put into a copy of the data; a model is trained on
it, and every detector scores at several of its epochs. So for each attack; then pipeline/choice.py picks and weights
detectors by how well they find the canaries of all. Its recall on a family is reported by leave-one-family-out. What
comes out is a policy for the data as it is, without a canary in it.

Trade-off: a training and a scoring for each attack that yield nothing but a rule; without them a detector is chosen by
the numbers of other people's data. Canaries that the model has learnt look like learnt poison, so a dose at which the
attacks work (`validate-attack`) is the honest one. A detector may know canaries by how they were injected rather than
by what they do (a published hash that no longer fits, another encoding; `probe` tells): offer only such as an attacker
could not avoid.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import ledger, spec
from pipeline.arguments import Out, Shards, at_least_one
from pipeline.choice import BUDGETS, Canaries, Rule, choose, held_out
from pipeline.draw import hash64
from pipeline.embed import embed
from pipeline.errors import InputError
from pipeline.inputs import EARLIER, EMBEDDED, TRACES
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.progress import run_stage
from pipeline.results import write_rows
from pipeline.score import score
from pipeline.scored import Scored, scores_folder
from pipeline.shard_map import code_digest, locked
from pipeline.shards import Shard, UidRule, list_shards
from pipeline.shards.store import absolute, write
from train.metrics import Rate

OTHERS = 50_000  # pairs besides an attack's canaries that the choice looks at, each for its share of all
FEW = 30  # canaries of an attack, below which its recall says little


def calibrate(
    shards: Shards,
    out: Out,
    /,
    *,
    detectors: tuple[str, ...],
    attacks: tuple[str, ...],
    dose: str,
    recipe: str = "demo",
    epochs: tuple[int, ...] = (),
    drop: float = 0.1,
    most: int = 4,
    pool: int = 16384,
    seed: int = 0,
    uid: UidRule = "key",
) -> int:
    """Choose detectors, weights and the time to score for SHARDS by known poisons in copies of them; resumable.

    Trains a model for each attack.

    Writes OUT/calibration.json (the policy), OUT/recall.parquet and OUT/calibration.md.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: local folder for the result, and for each attack's copy with canaries, its model and scores.
        detectors: to choose from, e.g. "slof(k=16)" clip_score; see `mithridate list detectors`.
        attacks: one or more of each family; what they have in name is a family, of an attack around another its inner.
        dose: of each attack's canaries: a number of pairs (300), 100ppm or 1%.
        recipe: how the model is trained; `mithridate list recipes` shows them.
        epochs: after which to score; default: all of which the recipe keeps a checkpoint.
        drop: share removed at which recall is to be best.
        most: picks that the rule may be made of; one detector may be picked several times.
        pool: reference rows of the neighbour detectors.
        seed: of the canaries, the training and the pool.
        uid: how a uid is derived where samples carry none.
    """
    job = _Calibration(
        absolute(shards), Path(out).absolute(), detectors, attacks, dose, recipe, epochs, drop, most, pool, seed, uid
    )
    trials = job.check()
    with locked(str(job.out)):
        return _calibrate(job, trials)


def _calibrate(job: "_Calibration", trials: Sequence["_Trial"]) -> int:
    drop = job.drop
    for trial in trials:
        trial.poison()
    for trial in trials:
        trial.make_scores()
    tables, folders = [trial.table() for trial in trials], trials[0].folders()
    found = _choose(tables, drop, job.most)
    used = {name.partition(":")[0] for name in found.rule.detectors}
    facts = {
        "policy": found.rule.policy(drop),
        "scores": [one for one in folders if one["folder"] in used],
        "pairs": round(tables[0].pairs),
        "canaries": {table.attack: int(table.canary.sum()) for table in tables},
        "removed": _shares(drop),
        "held_out": [asdict(one) for one in found.held_out],
        "spec": {**asdict(job), "out": ""},
        "code": code_digest(),
    }
    write(str(job.out / "calibration.json"), json.dumps(facts, indent=1).encode())
    write_rows(job.out / "recall.parquet", _rows(tables, found, folders, drop))
    said = markdown(tables, found, drop)
    write(str(job.out / "calibration.md"), said.encode())
    print(said)
    return 0


@dataclass(frozen=True)
class _Calibration:
    """The arguments."""

    shards: str
    out: Path
    detectors: tuple[str, ...]
    attacks: tuple[str, ...]
    dose: str
    recipe: str
    epochs: tuple[int, ...]
    drop: float
    most: int
    pool: int
    seed: int
    uid: UidRule

    def check(self) -> list["_Trial"]:
        """A trial for each attack; everything that can be wrong is found before the first hour is spent."""
        list_shards(self.shards)
        Dose.parse(self.dose)
        at_least_one("--detectors", self.detectors)
        for entry in map(_detector, self.detectors):
            if "poisoned" in entry.needs:
                raise InputError(f"{spec.text(entry)} reads the ledger: it would find every canary and nothing else")
        if not 0 < self.drop < 1 or self.most < 1:
            raise InputError("--drop is a share between 0 and 1, --most at least 1")
        attacks = {spec.text(entry): entry for entry in (spec.parse("attacks", text) for text in self.attacks)}
        if several := [text for text, entry in attacks.items() if len(entry.parts()) > 1]:
            raise InputError(f"--attacks: {several[0]} is several; give each of them, for it has canaries of its own")
        families = {spec.innermost(text) for text in attacks}
        if len(families) < 2:
            raise InputError(f"--attacks: of two families at least, for one is left out; here is {', '.join(families)}")
        when = self.when()
        return [_Trial(self, attack, when) for attack in attacks]

    def looked(self) -> list[int]:
        """Epochs whose checkpoints are looked at."""
        from train.recipes import recipe_of

        recipe = recipe_of(self.recipe)
        kept = [epoch for epoch in range(1, recipe.epochs + 1) if recipe.keeps(epoch)]
        if wrong := [epoch for epoch in self.epochs if epoch not in kept]:
            raise InputError(f"--epochs {wrong[0]}: {self.recipe!r} keeps checkpoints of epochs {kept}")
        return sorted(set(self.epochs)) or kept

    def when(self) -> dict[int, tuple[str, ...]]:
        """By epoch, who scores there. Whoever reads no embeddings scores the same at any epoch, so at the last only."""
        from train.recipes import recipe_of

        epochs, end = self.looked(), recipe_of(self.recipe).epochs
        found: dict[int, tuple[str, ...]] = {}
        for entry in map(_detector, self.detectors):
            if epochs[-1] < end and set(TRACES) & set(entry.needs) and not 0 < entry.until <= epochs[-1]:
                raise InputError(
                    f"{spec.text(entry)} reads more epochs than the {epochs[-1]} that --epochs looks at; write "
                    f"until={epochs[-1]}"
                )
            for epoch in _epochs_of(entry, epochs):
                found[epoch] = (*found.get(epoch, ()), spec.text(entry))
        if not found:
            raise InputError("--detectors: those that compare two checkpoints need two --epochs")
        return dict(sorted(found.items()))


def _epochs_of(detector: Any, looked: list[int]) -> list[int]:
    if set(detector.needs) & set(EARLIER):
        return looked[1:]
    return looked if set(detector.needs) & set(EMBEDDED) else looked[-1:]


@dataclass(frozen=True)
class _Trial:
    """The canaries of one attack, up to their scores; each stage is a verb that finds what it did before."""

    job: _Calibration
    attack: str
    when: dict[int, tuple[str, ...]]

    @property
    def folder(self) -> Path:
        return self.job.out / f"{spec.innermost(self.attack)}-{spec.digest(self.attack)}"

    @property
    def canaries(self) -> str:
        return str(self.folder / "canaries")

    def poison(self) -> None:
        """Put the canaries into a copy of the data."""
        drawn = {"dose": self.job.dose, "seed": self.job.seed}
        self._stage("canaries", poison, self.job.shards, self.canaries, attack=self.attack, **drawn)
        if not self._known():
            raise InputError(
                f"--dose {self.job.dose}: there is no canary of {self.attack}; take a larger dose, or an attack that "
                "the data has pairs for"
            )

    def make_scores(self) -> None:
        """Train, embed and score."""
        from train.launch import train

        model = self.folder / "model"
        self._stage("train", train, self.canaries, str(model), recipe=self.job.recipe, seed=self.job.seed)
        before = ""
        embedding = {*EMBEDDED, *EARLIER} & {need for text in self.job.detectors for need in _detector(text).needs}
        for epoch in self.job.looked():
            embeddings = str(self.folder / f"embeddings-{epoch:03d}")
            if embedding:
                checkpoint = str(model / "checkpoints" / f"epoch_{epoch:03d}")
                self._stage(f"embed epoch {epoch}", embed, self.canaries, embeddings, checkpoint=checkpoint)
            if epoch in self.when:
                folders = {"embeddings": embeddings, "earlier": before or None, "traces": str(model / "traces")}
                options = {"detector": self.when[epoch], "pool": self.job.pool, "seed": self.job.seed, **folders}
                self._stage(f"score epoch {epoch}", score, self.canaries, self._scores(epoch), **options)
            before = embeddings

    def folders(self) -> list[dict[str, Any]]:
        """Where each score comes from; of all attacks the same."""
        return [
            {"folder": scores_folder(epoch), "epoch": epoch, "detectors": names} for epoch, names in self.when.items()
        ]

    def table(self) -> Canaries:
        """What the choice is made of."""
        scored = Scored(tuple(map(self._scores, self.when)))
        return collect(scored, list_shards(self.canaries), self.attack, self._known(), self.job.seed)

    def _known(self) -> set[str]:
        return ledger.poisoned_uids(ledger.ledger_path(self.canaries))

    def _scores(self, epoch: int) -> str:
        return str(self.folder / scores_folder(epoch))

    def _stage(self, name: str, verb: Callable[..., int], *arguments: str, **options: Any) -> None:
        run_stage("calibrate", name, f"  ({self.attack})", verb, *arguments, uid=self.job.uid, **options)


def collect(scored: Scored, shards: Sequence[Shard], attack: str, canaries: Collection[str], seed: int) -> Canaries:
    """Scores of all canaries, and of about OTHERS other pairs, drawn by uid."""
    names = [shard.name for shard in shards]
    total = sum(len(part["uid"]) for part in scored.passes(names))
    share = min(1.0, OTHERS / max(total - len(canaries), 1))
    parts, columns = [], []
    for part in scored.passes(names):
        who = part.pop("uid")
        taken = [uid in canaries or hash64(seed, "calibrate", uid) < share * 2**64 for uid in who]
        columns = list(part)
        parts.append((who[taken], np.stack([part[name][taken] for name in columns], axis=1)))
    uid, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    canary = np.asarray([who in canaries for who in uid])
    others = int((~canary).sum())
    return Canaries(attack, tuple(columns), scores, canary, uid, (total - len(uid) + others) / max(others, 1))


@dataclass(frozen=True)
class HeldOut:
    """What the rule that was chosen without a family finds of an attack of it; and the best single detector."""

    family: str
    attack: str
    n: int
    policy: str
    recall: tuple[Rate, ...]
    single: str
    single_recall: tuple[Rate, ...]


@dataclass(frozen=True)
class Found:
    """The rule for the data, chosen by all families, and what may be expected of it."""

    rule: Rule
    held_out: tuple[HeldOut, ...]


def _choose(tables: Sequence[Canaries], drop: float, most: int) -> Found:
    several, single = held_out(tables, drop, most), held_out(tables, drop, 1)
    told, shares = [], _shares(drop)
    for table in tables:
        rule, alone = several[table.family], single[table.family]
        (name,) = alone.detectors
        recall = table.recalls(rule, shares)
        about = (table.family, table.attack, recall[0].n, rule.policy(drop))
        told.append(HeldOut(*about, recall, name, table.recalls(alone, shares)))
    return Found(choose(tables, drop, most), tuple(told))


def _rows(
    tables: Sequence[Canaries], found: Found, folders: Sequence[dict[str, Any]], drop: float
) -> list[dict[str, Any]]:
    epochs, shares = {one["folder"]: one["epoch"] for one in folders}, _shares(drop)
    rules = [("detector", Rule((name,))) for name in tables[0].columns]
    rules.append(("chosen on all families", found.rule))
    rows = []
    for how, rule in rules:
        folder, _, detector = rule.detectors[0].partition(":")
        single = how == "detector"
        about: dict[str, Any] = {"how": how, "rule": detector if single else rule.policy(drop)}
        about["epoch"] = epochs[folder] if single else None
        for table in tables:
            rates = zip(shares, table.recalls(rule, shares), strict=True)
            rows += [about | _row(table.family, table.attack, share, rate) for share, rate in rates]
    for one in found.held_out:
        about = {"how": "chosen without this family", "rule": one.policy, "epoch": None}
        rates = zip(shares, one.recall, strict=True)
        rows += [about | _row(one.family, one.attack, share, rate) for share, rate in rates]
    return rows


def _shares(drop: float) -> list[float]:
    return sorted({*BUDGETS, drop})


def _row(family: str, attack: str, share: float, rate: Rate) -> dict[str, Any]:
    about = {"family": family, "attack": attack, "removed": share}
    return about | {"recall": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}


def markdown(tables: Sequence[Canaries], found: Found, drop: float) -> str:
    """The policy, what may be expected of it, and what each detector alone finds."""
    most = max(int(table.canary.sum()) for table in tables)
    lines = [
        f"Policy for the data without canaries: `{found.rule.policy(drop)}`",
        "",
        f"Of each attack up to {most:,} canaries, {most / tables[0].pairs:.2%} of {round(tables[0].pairs):,} pairs, in "
        "a copy and a model of its own; at a share removed below that not all of them can be found.",
        "",
        "Recall on each attack by the rule that was chosen without its family, with 95% intervals:",
        "",
        *_head(
            "attack | canaries",
            *(f"{share:.1%} removed" for share in _shares(drop)),
            f"best single, chosen likewise, at {drop:.1%}",
        ),
    ]
    at = _shares(drop).index(drop)
    for one in found.held_out:
        cells = [f"`{one.attack}`", f"{one.n:,}", *map(_said, one.recall)]
        lines.append(f"| {' | '.join([*cells, f'{_said(one.single_recall[at])} `{one.single}`'])} |")
    if few := [f"`{one.attack}`" for one in found.held_out if one.n < FEW]:
        lines += ["", f"Fewer than {FEW} canaries, so little can be said: {', '.join(few)}."]
    lines += ["", "What each detector alone finds (attacks that were seen, so the best of them is partly luck):", ""]
    lines += _head("detector", *(f"`{table.attack}` at {drop:.1%}" for table in tables))
    for name in tables[0].columns:
        rates = [table.recalls(Rule((name,)), (drop,))[0] for table in tables]
        lines.append(f"| `{name}` | {' | '.join(map(_said, rates))} |")
    return "\n".join([*lines, ""])


def _head(*columns: str) -> list[str]:
    head = " | ".join(columns)
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]


def _said(rate: Rate) -> str:
    return "–" if rate.value is None else f"{rate.value:.1%} ({rate.low:.0%}–{rate.high:.0%})"


def _detector(text: str) -> Any:
    return spec.parse("detectors", text)


if __name__ == "__main__":
    from pipeline.cli import run

    run("calibrate")

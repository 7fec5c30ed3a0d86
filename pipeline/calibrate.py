"""Which detectors find poison in this dataset, and when are they to look? Asked with poison of our own.

Canaries, known poisons of several families at a small dose, are put into a copy of the data; a model is trained on it,
every detector scores at several of its epochs, and pipeline/choice.py picks and weights detectors by how well they find
the canaries. Its recall on a family is reported by leave-one-family-out. What comes out is a policy for the data as it
is, without a canary in it.

Trade-off: a training and a scoring that yield nothing but a rule; without them a detector is chosen by the numbers of
other people's data. Canaries that the model has learnt look like learnt poison, so a dose at which the attacks work
(`validate-attack`) is the honest one. All families are learnt by one model and may be in one pool, which a single
attacker's would not be. A detector may know canaries by how they were injected rather than by what they do (a published
hash that no longer fits, another encoding; `probe` tells): offer only such as an attacker could not avoid.
"""

import json
from collections.abc import Callable, Sequence
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
from pipeline.inputs import EARLIER, EMBEDDED
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.progress import run_stage
from pipeline.results import write_rows
from pipeline.score import score
from pipeline.scored import Scored, scores_folder
from pipeline.shard_map import code_digest
from pipeline.shards import Shard, UidRule, list_shards
from pipeline.shards.store import absolute, write
from train.metrics import Rate

OTHERS = 50_000  # pairs besides the canaries that the choice looks at, each for its share of all
FEW = 30  # canaries of a family, below which its recall says little


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
    """Choose detectors, weights and the time to score for SHARDS by known poisons in a copy of them; resumable.

    Writes OUT/calibration.json (the policy), OUT/recall.parquet and OUT/calibration.md.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: local folder for the copy with canaries, its model and scores, and the result.
        detectors: to choose from, e.g. "slof(k=16)" clip_score; see `mithridate list detectors`.
        attacks: one or more of each family; what they have in name is a family, of an attack around another its inner.
        dose: of all canaries together: a number of pairs (300), 100ppm or 1%.
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
    job.check()
    job.make_scores()
    table, folders = job.table()
    found = _choose(table, drop, most)
    used = {name.partition(":")[0] for name in found.rule.detectors}
    facts = {
        "policy": found.rule.policy(drop),
        "scores": [one for one in folders if one["folder"] in used],
        "pairs": round(table.pairs),
        "canaries": int((table.family != "").sum()),
        "removed": _shares(drop),
        "held_out": [asdict(one) for one in found.held_out],
        "spec": {**asdict(job), "out": ""},
        "code": code_digest(),
    }
    write(str(job.out / "calibration.json"), json.dumps(facts, indent=1).encode())
    write_rows(job.out / "recall.parquet", _rows(table, found, folders, drop))
    said = markdown(table, found, drop)
    write(str(job.out / "calibration.md"), said.encode())
    print(said)
    return 0


@dataclass(frozen=True)
class _Calibration:
    """The arguments, and the stages up to the scores; each is a verb that finds what it did before."""

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

    @property
    def canaries(self) -> str:
        return str(self.out / "canaries")

    def check(self) -> None:
        """Everything that can be wrong is found before the first hour is spent."""
        list_shards(self.shards)
        Dose.parse(self.dose)
        at_least_one("--detectors", self.detectors)
        if not 0 < self.drop < 1 or self.most < 1:
            raise InputError("--drop is a share between 0 and 1, --most at least 1")
        families = {spec.innermost(text) for text in self.attacks}
        if len(families) < 2:
            raise InputError(f"--attacks: of two families at least, for one is left out; here is {', '.join(families)}")
        spec.parse("attacks", self._attack)
        for entry in map(_detector, self.detectors):
            if "poisoned" in entry.needs:
                raise InputError(f"{spec.text(entry)} reads the ledger: it would find every canary and nothing else")
        self.when()

    @property
    def _attack(self) -> str:
        return f"multi(attacks={tuple(self.attacks)!r})"

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
        epochs, found = self.looked(), {}
        for epoch in epochs:
            names = []
            for entry in map(_detector, self.detectors):
                compares, looks = (bool(set(entry.needs) & set(columns)) for columns in (EARLIER, EMBEDDED))
                if epoch != epochs[0] if compares else looks or epoch == epochs[-1]:
                    names.append(spec.text(entry))
            if names:
                found[epoch] = tuple(names)
        if not found:
            raise InputError("--detectors: those that compare two checkpoints need two --epochs")
        return found

    def make_scores(self) -> None:
        """Poison, train, embed and score."""
        from train.launch import train

        def stage(name: str, verb: Callable[..., int], *arguments: str, **options: Any) -> None:
            run_stage("calibrate", name, "", verb, *arguments, **options)

        model = self.out / "model"
        stage("canaries", poison, self.shards, self.canaries, attack=self._attack, dose=self.dose, **self._drawn())
        if len(found := set(self.family().values())) < 2:
            raise InputError(
                f"--dose {self.dose}: the canaries are of {len(found)} family, and one is to be left out; take a "
                "larger dose, or attacks that the data has pairs for"
            )
        stage("train", train, self.canaries, str(model), recipe=self.recipe, **self._drawn())
        when, before = self.when(), ""
        embedding = {*EMBEDDED, *EARLIER} & {need for text in self.detectors for need in _detector(text).needs}
        for epoch in self.looked():
            embeddings = str(self.out / f"embeddings-{epoch:03d}")
            if embedding:
                checkpoint = str(model / "checkpoints" / f"epoch_{epoch:03d}")
                stage(f"embed epoch {epoch}", embed, self.canaries, embeddings, checkpoint=checkpoint, uid=self.uid)
            if epoch in when:
                folders = {"embeddings": embeddings, "earlier": before or None, "traces": str(model / "traces")}
                options = {"detector": when[epoch], "pool": self.pool, **folders, **self._drawn()}
                stage(f"score epoch {epoch}", score, self.canaries, self.scores(epoch), **options)
            before = embeddings

    def scores(self, epoch: int) -> str:
        return str(self.out / scores_folder(epoch))

    def table(self) -> tuple[Canaries, list[dict[str, Any]]]:
        """What the choice is made of, and where each score comes from."""
        when = self.when()
        scored = Scored(tuple(map(self.scores, when)))
        folders = [
            {"folder": scored.called(self.scores(epoch)), "epoch": epoch, "detectors": names}
            for epoch, names in when.items()
        ]
        return collect(scored, list_shards(self.canaries), self.family(), self.seed), folders

    def family(self) -> dict[str, str]:
        """Of each canary."""
        known = ledger.read(ledger.ledger_path(self.canaries))
        return {who: spec.innermost(text) for who, text in zip(*_pair(known, "uid", "attack"), strict=True)}

    def _drawn(self) -> dict[str, Any]:
        return {"seed": self.seed, "uid": self.uid}


def collect(scored: Scored, shards: Sequence[Shard], family: dict[str, str], seed: int) -> Canaries:
    """Scores of all canaries, and of about OTHERS other pairs, drawn by uid."""
    names = [shard.name for shard in shards]
    total = sum(len(part["uid"]) for part in scored.passes(names))
    clean = total - len(family)
    share = min(1.0, OTHERS / max(clean, 1))
    parts, columns = [], []
    for part in scored.passes(names):
        who = part.pop("uid")
        taken = [uid in family or hash64(seed, "calibrate", uid) < share * 2**64 for uid in who]
        columns = list(part)
        parts.append((who[taken], np.stack([part[name][taken] for name in columns], axis=1)))
    uid, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    families = np.asarray([family.get(who, "") for who in uid], dtype=object)
    others = int((families == "").sum())
    return Canaries(tuple(columns), scores, families, uid, (total - len(uid) + others) / max(others, 1))


@dataclass(frozen=True)
class HeldOut:
    """What the rule that was chosen without a family finds of it, by share removed; and the best single detector."""

    family: str
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


def _choose(table: Canaries, drop: float, most: int) -> Found:
    several, single = held_out(table, drop, most), held_out(table, drop, 1)
    told, shares = [], _shares(drop)
    for family, rule in several.items():
        recall, alone = (table.recalls(one, family, shares) for one in (rule, single[family]))
        (name,) = single[family].detectors
        told.append(HeldOut(family, recall[0].n, rule.policy(drop), recall, name, alone))
    return Found(choose(table, table.families, drop, most), tuple(told))


def _rows(table: Canaries, found: Found, folders: Sequence[dict[str, Any]], drop: float) -> list[dict[str, Any]]:
    epochs, shares = {one["folder"]: one["epoch"] for one in folders}, _shares(drop)
    rules = [("detector", Rule((name,))) for name in table.columns]
    rules.append(("chosen on all families", found.rule))
    rows = []
    for how, rule in rules:
        folder, _, detector = rule.detectors[0].partition(":")
        single = how == "detector"
        about: dict[str, Any] = {"how": how, "rule": detector if single else rule.policy(drop)}
        about["epoch"] = epochs[folder] if single else None
        for family in table.families:
            rates = zip(shares, table.recalls(rule, family, shares), strict=True)
            rows += [about | _row(family, share, rate) for share, rate in rates]
    for one in found.held_out:
        about = {"how": "chosen without this family", "rule": one.policy, "epoch": None}
        rows += [about | _row(one.family, share, rate) for share, rate in zip(shares, one.recall, strict=True)]
    return rows


def _shares(drop: float) -> list[float]:
    return sorted({*BUDGETS, drop})


def _row(family: str, share: float, rate: Rate) -> dict[str, Any]:
    return {"family": family, "removed": share, "recall": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}


def markdown(table: Canaries, found: Found, drop: float) -> str:
    """The policy, what may be expected of it, and what each detector alone finds."""
    canaries = int((table.family != "").sum())
    lines = [
        f"Policy for the data without canaries: `{found.rule.policy(drop)}`",
        "",
        f"{canaries:,} canaries of {len(table.families)} families are {canaries / table.pairs:.2%} of "
        f"{round(table.pairs):,} pairs. Each family is ranked without the others, as if it were the only poison; at a "
        "share removed below its own not all of it can be found.",
        "",
        "Recall on each family by the rule that was chosen without it, with 95% intervals:",
        "",
        *_head("family | canaries", *(f"{share:.1%} removed" for share in _shares(drop)), f"best single at {drop:.1%}"),
    ]
    at = _shares(drop).index(drop)
    for one in found.held_out:
        cells = [one.family, f"{one.n:,}", *map(_said, one.recall), f"{_said(one.single_recall[at])} `{one.single}`"]
        lines.append(f"| {' | '.join(cells)} |")
    if few := [one.family for one in found.held_out if one.n < FEW]:
        lines += ["", f"Fewer than {FEW} canaries, so little can be said: {', '.join(few)}."]
    lines += ["", "What each detector alone finds (families that were seen, so the best of them is partly luck):", ""]
    lines += _head("detector", *(f"{family} at {drop:.1%}" for family in table.families))
    for name in table.columns:
        rates = [table.recalls(Rule((name,)), family, (drop,))[0] for family in table.families]
        lines.append(f"| `{name}` | {' | '.join(map(_said, rates))} |")
    return "\n".join([*lines, ""])


def _head(*columns: str) -> list[str]:
    head = " | ".join(columns)
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]


def _said(rate: Rate) -> str:
    return "–" if rate.value is None else f"{rate.value:.1%} ({rate.low:.0%}–{rate.high:.0%})"


def _detector(text: str) -> Any:
    return spec.parse("detectors", text)


def _pair(table: Any, *names: str) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in names]


if __name__ == "__main__":
    from pipeline.cli import run

    run("calibrate")

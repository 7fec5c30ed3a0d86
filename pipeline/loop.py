"""The whole circle over attacks x doses x (filters + defenses) x seeds.

One undefended training serves all detectors that score it, and all defenses that repair it.

Trade-off: stages run one after the other and meet in files, so a killed loop goes on where it was and any stage can be
looked at; runs in parallel would be faster on a large cluster.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pipeline import ledger, spec
from pipeline.arguments import Out
from pipeline.config import Config, Filter
from pipeline.embed import embed
from pipeline.errors import InputError
from pipeline.filter import filter_shards
from pipeline.inputs import EARLIER, EMBEDDED
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.policies._select import column
from pipeline.progress import console, run_stage
from pipeline.quality import quality
from pipeline.score import read_scores, score, scores_path
from pipeline.scored import scores_folder
from pipeline.shards import list_shards
from pipeline.shards.store import whole


def loop(config: Annotated[str, tyro.conf.arg(metavar="CONFIG")], out: Out, /) -> int:
    """Run every attack x dose x seed of CONFIG, undefended, under every filter and every defense; resumable.

    Writes OUT/results.parquet (a row a run), OUT/detectors.parquet and OUT/report.html.

    Args:
        config: TOML file; docs/formats.md describes it.
        out: folder for all runs.
    """
    plan = Config.read(config)
    _check(plan)
    begin = time.monotonic()
    runs = [
        Run(plan, attack, dose, seed, _folder(plan, attack, dose, seed, out))
        for attack in plan.attacks
        for dose in plan.doses
        for seed in plan.seeds
    ]
    trainings = len(runs) * (1 + len(plan.filters) + len(plan.defenses))
    console.print(f"loop: {len(runs)} attack x dose x seed, {trainings} trainings under recipe {plan.recipe!r}")
    arms = [row for run in runs for row in run.arms()]
    detectors = [row for run in runs for row in run.detectors()]
    _write_table(Path(out) / "results.parquet", arms)
    _write_table(Path(out) / "detectors.parquet", detectors)
    from pipeline.report.summary import write_report

    write_report(plan, runs, arms, detectors, Path(config), Path(out), time.monotonic() - begin)
    return 0


@dataclass(frozen=True)
class Run:
    """One attack, dose and seed: a poisoned set, its undefended model, and an arm per filter and defense."""

    plan: Config
    attack: str
    dose: str
    seed: int
    folder: Path

    @property
    def poisoned(self) -> str:
        return str(self.folder / "poisoned")

    def arms(self) -> list[dict[str, Any]]:
        self._stage(
            "poison", poison, self.plan.shards, self.poisoned, attack=self.attack, dose=self.dose, seed=self.seed
        )
        rows = [self._arm("undefended", None, self.poisoned)]
        before = None
        for scores in self.plan.scores:
            embeddings, out = self._embeddings(scores.epoch), self._scores(scores.epoch)
            needs = {need for text in scores.detectors for need in spec.parse("detectors", text).needs}
            if needs & {*EMBEDDED, *EARLIER}:
                checkpoint = str(self.folder / "undefended" / "checkpoints" / f"epoch_{scores.epoch:03d}")
                self._stage(f"embed epoch {scores.epoch}", embed, self.poisoned, embeddings, checkpoint=checkpoint)
            self._stage(
                f"score epoch {scores.epoch}",
                score,
                self.poisoned,
                out,
                detector=scores.detectors,
                embeddings=embeddings,
                earlier=before,
                traces=str(self.folder / "undefended" / "traces"),
                seed=self.seed,
            )
            before = embeddings if needs & {*EMBEDDED, *EARLIER} else before
        for arm in self.plan.filters:
            folder = self.folder / f"filter-{spec.digest([arm.policy, arm.epoch])}"
            scored = tuple(map(self._scores, arm.epochs))
            self._stage(
                f"filter {arm.policy}", filter_shards, self.poisoned, str(folder), scores=scored, policy=arm.policy
            )
            rows.append(self._arm(_arm_name(arm.policy), arm, str(folder / "kept")))
        return rows + [
            self._arm(spec.key(spec.parse("defenses", d)), None, self.poisoned, d) for d in self.plan.defenses
        ]

    def detectors(self) -> list[dict[str, Any]]:
        rows = []
        for scores in self.plan.scores:
            found, poisoned = self.scores_and_truth(scores.epoch)
            seconds = _marker_seconds(self._scores(scores.epoch), self.plan.shards)
            for name in (n for n in found if n != "uid"):
                row = self._common() | {"detector": name, "when": f"epoch {scores.epoch}"}
                row |= quality(found[name], found["uid"], poisoned)
                spent = seconds.get(name, 0.0)
                rows.append(row | {"seconds": spent, "microseconds_per_sample": 1e6 * spent / max(len(poisoned), 1)})
        return rows

    def scores_and_truth(self, epoch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All scores of an epoch, and which rows are poisoned."""
        parts = [read_scores(scores_path(self._scores(epoch), s.name)) for s in list_shards(self.poisoned)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        known = ledger.poisoned_uids(ledger.ledger_path(self.poisoned))
        return found, np.asarray([u in known for u in found["uid"]])

    def _arm(self, name: str, arm: Filter | None, shards: str, defense: str | None = None) -> dict[str, Any]:
        from train.evaluate import evaluate
        from train.launch import final_checkpoint, train

        undefended = self.folder / "undefended"
        folder = undefended if arm is None else Path(shards).parent / "model"
        options: dict[str, Any] = {"recipe": self.plan.recipe, "seed": self.seed}
        if defense:
            folder = self.folder / f"defense-{spec.digest(defense)}" / "model"
            repairs = spec.parse("defenses", defense).needs_init
            options |= {"defense": defense, "init": final_checkpoint(str(undefended)) if repairs else None}
        self._stage(f"train {name}", train, shards, str(folder), **options)
        facts = json.loads((folder / "train.json").read_text())
        self._stage(
            f"evaluate {name}",
            evaluate,
            final_checkpoint(str(folder)),
            str(folder / "evaluation"),
            shards=self.plan.evaluation,
            classes=self.plan.classes,
            attack=json.loads((Path(self.poisoned) / "dataset.json").read_text())["spec"]["attack"],
            seed=self.seed,
            reference=self.plan.reference or self.plan.shards,
            ledger=ledger.ledger_path(self.poisoned),
        )
        measured = json.loads((folder / "evaluation" / "evaluation.json").read_text())["metrics"]
        total = json.loads((Path(self.poisoned) / "dataset.json").read_text())
        left = facts["known_poisons"] if defense else len(ledger.poisoned_uids(ledger.ledger_path(shards)))
        row = self._common() | {"arm": name, "when": arm.when if arm else None, "recipe": self.plan.recipe}
        row |= {"policy": arm.policy if arm else None, "samples": facts["pairs"]}
        removed = total["pairs"] - facts["pairs"] - sum(facts["skipped"].values())
        row |= {"defense": defense, "removed": None if defense else removed}
        row |= {"poisons_in": total["poisoned"], "poisons_left": left, "train_seconds": facts["seconds"]}
        row |= self._cost(arm, total["pairs"])
        return row | measured

    def _cost(self, arm: Filter | None, pairs: int) -> dict[str, float | None]:
        """Worker seconds of embedding, of its detectors, and of rewriting; not of training the scoring model."""
        if arm is None:
            return {"filter_seconds": None, "filter_cpu_seconds_per_million": None}
        spent = {
            f"{scores_folder(epoch)}:{name}": value
            for epoch in arm.epochs
            for name, value in _marker_seconds(self._scores(epoch), self.plan.shards).items()
            if name not in ("read", "compute", "write", "total", "cpu")
        }
        names = {column(spent, detector) for detector in _read_by(arm.policy)}
        seconds = cpu = sum(spent[name] for name in names)
        stages = [str(self.folder / f"filter-{spec.digest([arm.policy, arm.epoch])}")]
        for epoch in arm.epochs:
            read = [name.partition(":")[2] for name in names if name.startswith(f"{scores_folder(epoch)}:")]
            if any(set(EMBEDDED) & set(spec.parse("detectors", name).needs) for name in read):
                stages.append(self._embeddings(epoch))
        for stage in stages:
            took = _marker_seconds(stage, self.plan.shards)
            seconds, cpu = seconds + took["total"], cpu + took["cpu"]
        return {"filter_seconds": seconds, "filter_cpu_seconds_per_million": 1e6 * cpu / max(pairs, 1)}

    def _common(self) -> dict[str, Any]:
        total = json.loads((Path(self.poisoned) / "dataset.json").read_text())
        return {"attack": self.attack, "dose": total["poisoned"], "dose_ppm": total["ppm"], "seed": self.seed}

    def _embeddings(self, epoch: int) -> str:
        return str(self.folder / f"embeddings-{epoch:03d}")

    def _scores(self, epoch: int) -> str:
        return str(self.folder / scores_folder(epoch))

    def _stage(self, name: str, verb: Callable[..., int], *arguments: str, **options: Any) -> None:
        about = f"  ({self.attack}, dose {self.dose}, seed {self.seed})"
        run_stage("loop", name, about, verb, *arguments, uid=self.plan.uid, **options)


def _folder(plan: Config, attack: str, dose: str, seed: int, out: str) -> Path:
    """One folder for all that determines a run; another config in the same OUT does not meet it."""
    name = spec.parse_call(attack)[0]
    facts = spec.digest([attack, dose, plan.shards, plan.recipe, plan.uid])
    return Path(out).absolute() / f"{name}-{dose.replace('%', 'percent')}-{facts}-seed{seed}"


def _arm_name(policy: str) -> str:
    """The detector that a policy acts on; of several, the policy itself."""
    names = _read_by(policy)
    return names[0] if len(names) == 1 else policy


def _read_by(policy: str) -> tuple[str, ...]:
    detectors: tuple[str, ...] = spec.parse("policies", policy).detectors
    return detectors


def _check(plan: Config) -> None:
    """Everything that can be wrong is found before the first hour is spent."""
    from train.labels import read_classes
    from train.recipes import recipe_of

    recipe = recipe_of(plan.recipe)
    for shards in (plan.shards, plan.evaluation, plan.reference or plan.shards):
        list_shards(shards)
    classes = read_classes(plan.classes)
    for attack in plan.attacks:
        for part in spec.parse("attacks", attack).parts():
            if part.target not in classes:
                raise InputError(f"{plan.classes}: {part.target!r}, the target of {attack}, is not among these classes")
    for dose in plan.doses:
        Dose.parse(dose)
    kept = [epoch for epoch in range(1, recipe.epochs + 1) if recipe.keeps(epoch)]
    for defense in plan.defenses:
        spec.parse("defenses", defense).by_content()  # that what it names is there
    scored: dict[int, list[str]] = {}
    for scores in plan.scores:
        if scores.epoch not in kept:
            raise InputError(f"scores at epoch {scores.epoch}: {plan.recipe!r} keeps checkpoints of epochs {kept}")
        entries = [spec.parse("detectors", text) for text in scores.detectors]
        for entry in entries:
            if set(EARLIER) & set(entry.needs) and not scored:
                raise InputError(f"{spec.text(entry)} compares two epochs: let it score at a later one than the first")
        scored[scores.epoch] = [spec.text(entry) for entry in entries]
    for arm in plan.filters:
        for detector in _read_by(arm.policy):
            column([f"{scores_folder(e)}:{name}" for e in arm.epochs for name in scored.get(e, [])], detector)


def _marker_seconds(folder: str, shards: str) -> dict[str, float]:
    """Seconds of a job by what they were spent on, summed over its markers."""
    total: dict[str, float] = {}
    for shard in list_shards(shards):
        for name, seconds in json.loads((Path(folder) / f"{shard.name}.stats.json").read_text())["seconds"].items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import polars as pl

    with whole(str(path)) as file:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(file)


if __name__ == "__main__":
    from pipeline.cli import run

    run("loop")

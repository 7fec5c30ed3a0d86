"""Does an attack work here at all? Only one that does, undefended, may be used to credit a defense.

Each attack x dose x seed is poisoned, trained without any defense and evaluated. A control per seed, the same model
trained on clean data, is asked for the same success: a trigger may fool a model that was never poisoned. An attack is
valid from the smallest dose at which the lower end of its interval exceeds both the floor and the upper end of the
control's; below that dose no defense may be said to have stopped it.

Trade-off: trials run side by side on a core each, which is faster than one after the other on all cores. The interval
is over evaluation images of all seeds together; how far the seeds lie apart is shown beside it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline import ledger, spec
from pipeline.arguments import Out
from pipeline.attacks._attack import Attack
from pipeline.config import Validation
from pipeline.errors import InputError
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.progress import console
from pipeline.results import FILE, write_rows
from pipeline.shard_map import code_digest, each
from pipeline.shards import list_shards
from pipeline.shards.store import absolute, make_folder, write
from train.metrics import wilson
from train.results import SUCCESS

CONTROL = "{control}"  # in a spec: the checkpoint of a clean model of another seed, for attacks that need one


def validate_attack(config: Annotated[str, tyro.conf.arg(metavar="CONFIG")], out: Out, /) -> int:
    """From which dose on does each attack of CONFIG work, undefended? Resumable; a trial a core.

    Writes OUT/results.parquet (a row a trial) and OUT/attacks.md.

    Args:
        config: TOML file with [[trials]]; docs/formats.md describes it.
        out: folder for all trials.
    """
    plan, folder = _whole(Validation.read(config)), Path(out).absolute()
    _check(plan)
    seeds = sorted({seed for trials in plan.trials for seed in trials.seeds})
    controls = {seed: _Control(seed, str(folder / f"control-{_digest(plan)}-seed{seed}")) for seed in seeds}
    trials = _trials(plan, folder, controls)
    todo = [trial for trial in trials if not trial.row.exists()]
    console.print(f"{len(trials)} trials and {len(seeds)} controls under recipe {plan.recipe!r}; {len(todo)} to do")
    if CONTROL in str(plan.trials) and len(seeds) == 1:
        console.print(f"{CONTROL} is the defender's own clean model, for there is one seed; two keep them apart")
    _run("clean models", list(controls.values()), plan)
    for trial in todo:
        poison(plan.shards, trial.poisoned, attack=trial.attack, dose=trial.dose, seed=trial.seed, uid=plan.uid)
    _run("trials", todo, plan)
    rows = [row for trial in trials for row in json.loads(trial.row.read_text())]
    if older := sum(row["code"] != code_digest() for row in rows):
        console.print(f"{older} of {len(rows)} results are of other code; remove their trial.json to have them again")
    write_rows(folder / FILE, rows)
    table = markdown(rows, plan.floor)
    write(str(folder / "attacks.md"), table.encode())
    print(table)
    return 0


@dataclass(frozen=True)
class _Control:
    """A model trained on the clean data."""

    seed: int
    path: str

    @property
    def checkpoint(self) -> str:
        from train.launch import final_checkpoint

        return final_checkpoint(self.path)

    def __call__(self, plan: Validation) -> None:
        from train.launch import train

        train(plan.shards, self.path, recipe=plan.recipe, seed=self.seed, uid=plan.uid)


@dataclass(frozen=True)
class _Trial:
    """One attack, dose and seed; `control` where its clean model is asked too."""

    named: str  # as the config has it
    dose: str
    seed: int
    path: str
    clean: _Control
    surrogate: _Control  # the attacker's
    control: bool

    @property
    def attack(self) -> str:
        return self.named.replace(CONTROL, self.surrogate.checkpoint) if CONTROL in self.named else self.named

    @property
    def poisoned(self) -> str:
        return f"{self.path}/poisoned"

    @property
    def row(self) -> Path:
        return Path(self.path, "trial.json")

    def __call__(self, plan: Validation) -> None:
        """Train, evaluate, note the result; the weights are not kept."""
        from train.launch import final_checkpoint, train

        model = f"{self.path}/model"
        train(self.poisoned, model, recipe=plan.recipe, seed=self.seed, uid=plan.uid)
        rows = [self._measured("poisoned", final_checkpoint(model), plan)]
        if self.control:
            rows.append(self._measured("control", self.clean.checkpoint, plan))
        shutil.rmtree(model)
        write(str(self.row), json.dumps(rows, indent=1).encode())

    def _measured(self, arm: str, checkpoint: str, plan: Validation) -> dict[str, Any]:
        from train.evaluate import evaluate

        total = json.loads(Path(self.poisoned, "dataset.json").read_text())
        out, attack = f"{self.path}/{arm}", total["spec"]["attack"]
        evaluate(
            checkpoint,
            out,
            shards=plan.evaluation,
            classes=plan.classes,
            attack=attack,
            seed=self.seed,
            reference=plan.reference,
            ledger=ledger.ledger_path(self.poisoned),
            uid=plan.uid,
        )
        facts = {"attack": self.named, "spec": attack, "arm": arm, "dose": self.dose, "seed": self.seed}
        facts |= {"poisons": total["poisoned"] if arm == "poisoned" else 0, "code": code_digest()}
        return facts | json.loads(Path(out, "evaluation.json").read_text())["metrics"]


def _whole(plan: Validation) -> Validation:
    """The embedded data where no other is named, and absolute paths: workers start in another folder."""
    from pipeline.demo import embedded

    if not plan.shards:
        data = embedded()
        plan = replace(plan, shards=data.shards, evaluation=data.evaluation, classes=data.classes)
        plan = replace(plan, reference=plan.reference or f"{data.shards}/00000000.parquet")
    plan = replace(plan, reference=plan.reference or plan.shards)
    shards, evaluation, classes, reference = map(absolute, (plan.shards, plan.evaluation, plan.classes, plan.reference))
    return replace(plan, shards=shards, evaluation=evaluation, classes=classes, reference=reference)


def _check(plan: Validation) -> None:
    """Everything that can be wrong is found before the first hour is spent."""
    from train.labels import key, read_classes
    from train.recipes import recipe_of

    recipe_of(plan.recipe)
    for shards in (plan.shards, plan.evaluation, plan.reference):
        list_shards(shards)
    classes = set(map(key, read_classes(plan.classes)))
    if not plan.trials:
        raise InputError("nothing to try: write [[trials]] tables")
    for trials in plan.trials:
        for text in trials.attacks:
            attack: Attack = spec.parse("attacks", text)
            if unknown := [part.target for part in attack.parts() if key(part.target) not in classes]:
                raise InputError(f"{plan.classes}: {unknown[0]!r}, a target of {text}, is not among these classes")
        for dose in trials.doses:
            Dose.parse(dose)


def _trials(plan: Validation, folder: Path, controls: dict[int, _Control]) -> list[_Trial]:
    found: list[_Trial] = []
    next_seed = dict(zip(controls, [*list(controls)[1:], *controls], strict=False))
    for trials in plan.trials:
        for text in trials.attacks:
            for seed in trials.seeds:
                for dose in trials.doses:
                    where = f"{spec.parse_call(text)[0]}-{dose}-{spec.digest([text, _digest(plan)])}-seed{seed}"
                    control = dose == trials.doses[0]
                    found.append(
                        _Trial(
                            text, dose, seed, str(folder / where), controls[seed], controls[next_seed[seed]], control
                        )
                    )
    return found


def _digest(plan: Validation) -> str:
    """Of all that a trial depends on besides its own attack, dose and seed."""
    from train.recipes import recipe_of

    return spec.digest(
        [plan.shards, plan.evaluation, plan.classes, plan.reference, plan.uid, recipe_of(plan.recipe).digest]
    )


def _run(label: str, todo: Sequence[_Control] | Sequence[_Trial], plan: Validation) -> None:
    for item in todo:
        make_folder(item.path)
    failures = [str(result) for _, result in each(label, todo, _call, plan) if isinstance(result, InputError)]
    if failures:
        raise InputError(f"{label}: {len(failures)} failed; the same command goes on:\n  " + "\n  ".join(failures))


def _call(item: _Control | _Trial, plan: Validation) -> None:
    item(plan)


def markdown(rows: Sequence[dict[str, Any]], floor: float) -> str:
    """The table of all attacks and doses, and the verdicts."""
    heads = "attack|dose|poisons|seeds|success|95%|seeds from–to|by|control|kNN readout|true class kept|top-1|valid"
    lines = [f"| {heads.replace('|', ' | ')} |", "|" + "---|" * len(heads.split("|"))]
    verdicts = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        mine = [row for row in rows if row["attack"] == attack]
        by = next((name for name in SUCCESS if any(row[f"{name}_n"] for row in mine)), SUCCESS[0])
        clean = _pooled([row for row in mine if row["arm"] == "control"], by)
        valid_from = None
        arms = sorted((row for row in mine if row["arm"] == "poisoned"), key=lambda row: row["poisons"])
        for dose in dict.fromkeys(row["dose"] for row in arms):
            trials = [row for row in arms if row["dose"] == dose]
            found = _pooled(trials, by)
            valid = found.low > max(floor, clean.high)
            valid_from = valid_from or (dose if valid else None)
            values = sorted(row[by] for row in trials if row[by] is not None)
            lines.append(
                f"| `{attack}` | {dose} | {trials[0]['poisons']:,} | {len(trials)} | {_percent(found.value)} "
                f"| {_percent(found.low)}–{_percent(found.high)} of {found.n:,} "
                f"| {_percent(values[0] if values else None)}–{_percent(values[-1] if values else None)} | {by} "
                f"| {_percent(clean.value)} | {_percent(_pooled(trials, 'asr_knn').value)} "
                f"| {_percent(_pooled(trials, 'triggered_accuracy').value)} "
                f"| {_percent(_pooled(trials, 'zeroshot_top1').value)} | {'**yes**' if valid else 'no'} |"
            )
        verdicts.append(f"- `{attack}`: " + (f"valid from {valid_from} on" if valid_from else "**not valid here**"))
    return "\n".join([*lines, "", *verdicts, ""])


@dataclass(frozen=True)
class _Pooled:
    value: float | None
    low: float
    high: float
    n: int


def _pooled(rows: Sequence[dict[str, Any]], metric: str) -> _Pooled:
    """A rate over the evaluation images of all seeds, with its Wilson interval; (0, 1) where nothing was asked."""
    n = sum(row[f"{metric}_n"] or 0 for row in rows)
    if not n:
        return _Pooled(None, 0.0, 1.0, 0)
    k = round(sum((row[metric] or 0.0) * (row[f"{metric}_n"] or 0) for row in rows))
    return _Pooled(k / n, *wilson(k, n), n)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


if __name__ == "__main__":
    from pipeline.cli import run

    run("validate-attack")

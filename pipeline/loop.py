"""The whole circle over attacks x doses x (filters + defenses) x seeds.

One undefended training serves all detectors that score it, and all defenses that repair it; at dose 0 one serves all
attacks. A dose `adaptive(…)` is a bisection for each attack, arm and seed (pipeline/doses.py).

Trade-off: stages meet in files, so a killed loop goes on where it was and any stage can be looked at, and what is
written takes disk. Of all attacks the undefended models come first: who watches knows soon which attacks work, and
waits longer for the first filter.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import tyro

from pipeline import spec
from pipeline.arguments import Out
from pipeline.board import Board
from pipeline.config import Config
from pipeline.doses import Adaptive, Search
from pipeline.errors import InputError
from pipeline.estimate import Estimate, estimate, grid_of, hours, runs_of
from pipeline.inputs import EARLIER
from pipeline.lanes import Lanes
from pipeline.plan import Dose
from pipeline.policies._select import column
from pipeline.progress import console
from pipeline.results import FILE, REPORT, write_rows
from pipeline.runs import UNDEFENDED, Arm, Run, arms_of, columns_of, read_by, source_digest
from pipeline.shard_map import locked
from pipeline.shards import list_shards
from train.results import judged

Row = dict[str, Any]


def loop(
    config: Annotated[str, tyro.conf.arg(metavar="CONFIG")],
    out: Out,
    /,
    *,
    parallel: int = 1,
    dry_run: bool = False,
    max_hours: float = 72.0,
) -> int:
    """Run every attack x dose x seed of CONFIG, undefended, under every filter and every defense; resumable.

    Of doses that are bisected each arm has those that its search asks for.

    Writes OUT/results.parquet (a row a run), OUT/detectors.parquet and OUT/report.html.

    Args:
        config: TOML file; docs/formats.md describes it.
        out: folder for all runs; on a cluster one that all nodes see.
        parallel: trainings at a time, on Ray: a GPU each, or a share of the cores, where one core each gets furthest.
        dry_run: say how many trainings there are, how many OUT has already and what the others will take; do nothing.
        max_hours: refuse to start what is estimated to take longer.
    """
    plan, folder = Config.read(config), Path(out).absolute()
    _check(plan)
    if parallel < 1:
        raise InputError(f"--parallel {parallel}: at least one training at a time")
    lanes = Lanes(parallel)
    cost = estimate(plan, folder, parallel)
    console.print(f"loop: recipe {plan.recipe!r}, {cost}")
    if dry_run:
        if cost.hours > max_hours:
            console.print(f"more than --max-hours {max_hours:g}: it would be refused")
        return 0
    if not cost.hours <= max_hours:
        raise InputError(
            f"{config}: {cost.left:,} trainings would take {hours(cost.hours)} ({cost.source}), more than --max-hours "
            f"{max_hours:g}; take fewer attacks, doses, arms or seeds, or a larger --max-hours"
        )
    with locked(str(folder)):
        _run(plan, Path(config), folder, cost, lanes)
    return 0


def _run(plan: Config, config: Path, folder: Path, cost: Estimate, lanes: Lanes) -> None:
    """Train what is missing and write OUT."""
    (folder / REPORT).unlink(missing_ok=True)  # who has one has all that it tells of
    for run in _dearest(plan, folder):  # what cannot be poisoned as asked is found before the first training
        run.poison()
    with Board(cost) as board:
        table = _Table(plan, folder, board, lanes)
        _make(plan, folder, table.row, lanes.each)
    made = {one: table.made[one] for one in table.asked if one in table.made}
    arms = [*made.values()]
    write_rows(folder / FILE, arms)
    _say_mixed(arms)
    if others := len([*folder.glob("*/*/row-*.json")]) - len(arms):
        console.print(f"{others} rows of another config, or of inputs that changed, stay in {folder} and in no table")
    runs = list(dict.fromkeys(run for run, _ in made))
    for run in runs:
        if run.watchable and (run.compares or not run.scored):  # no arm asked for it, or it was added to the config
            run.score()
    runs = [run for run in runs if run.scored]
    runs.sort(key=lambda run: run.clean)  # the report shows pictures of the first
    detectors = [row for run in runs for row in run.detectors()]
    write_rows(folder / "detectors.parquet", detectors)
    from pipeline.report.summary import write_report

    write_report(plan, runs, arms, detectors, config, folder)


class _Table:
    """Each row once, by who asks first; results.parquet is written with each."""

    def __init__(self, plan: Config, out: Path, board: Board, lanes: Lanes):
        self.out, self.board, self.lanes = out, board, lanes
        self.asked = [(run, arm) for run in runs_of(plan, out) for arm in arms_of(plan)]
        self.made: dict[tuple[Run, Arm], Row] = {}
        # a loop that is started again and stopped soon has no fewer rows than it had
        self.before = {(run, arm): row for run, arm in self.asked if (row := run.kept(arm))}
        self.writing = Lock()

    def row(self, run: Run, arm: Arm) -> Row:
        with self.lanes.alone((run.folder, arm)):  # at dose 0 the attacks share a training
            if (run, arm) not in self.made:
                row = self.board.row(run, arm, self.lanes.row)
                with self.writing:
                    self.made[run, arm] = row
                    known = self.before | self.made
                    write_rows(self.out / FILE, [known[one] for one in self.asked if one in known])
        return self.made[run, arm]


def _make(plan: Config, out: Path, row: Callable[[Run, Arm], Row], each: Callable[..., list[bool]]) -> None:
    """Ask for every row: of each attack, dose, seed and arm those of its search.

    Where an attack fails undefended with every seed of a bisection, nothing can be credited, and no arm is run. Where
    it works with any, all seeds have every arm: the seeds with which an attack works are the easy ones, and a
    protection factor of those alone would be of a selection.
    """

    def search(attack: str, dose: str, seed: int, arm: Arm) -> bool:
        """Whether the arm's success is one half at some dose."""
        found = Search(tuple(grid_of(dose)))
        while at := found.next:
            run = Run(plan, attack, at, seed, out)
            if arm.watches:
                row(run, UNDEFENDED)
            found.tell(at, judged(row(run, arm))[1])
        return found.reached

    asked = [*itertools.product(plan.attacks, plan.doses, plan.seeds)]
    works: dict[tuple[str, str], bool] = {}
    for (attack, dose, _), reached in zip(asked, each(search, [(*one, UNDEFENDED) for one in asked]), strict=True):
        works[attack, dose] = works.get((attack, dose), False) or reached or not Adaptive.parse(dose)
    for attack, dose in (failing for failing, any_seed in works.items() if not any_seed):
        console.print(f"{attack}: not reached at {grid_of(dose)[-1]}, so no filter or defense is tried")
    arms = [arm for arm in arms_of(plan) if arm != UNDEFENDED]
    each(search, [(*one, arm) for one in asked if works[one[:2]] for arm in arms])


def _dearest(plan: Config, out: Path) -> list[Run]:
    """Of each attack and seed the run with most poisons: of a share and a number, both."""
    found: dict[tuple[str, int, bool], Run] = {}
    for run in runs_of(plan, out):
        dose = Dose.parse(run.dose)
        key = (run.attack, run.seed, dose.count is None)
        before = Dose.parse(found[key].dose) if key in found else None
        if before is None or (dose.count or 0, dose.share) > (before.count or 0, before.share):
            found[key] = run
    return list(found.values())


def _say_mixed(rows: list[dict[str, Any]]) -> None:
    older = [row for row in rows if row["code"] != source_digest()]
    if older:
        console.print(
            f"{len(older)} of {len(rows)} rows are of other code (column `code`); remove their row-*.json, and their "
            "trainings where those changed, to have them again"
        )


def _check(plan: Config) -> None:
    """Everything that can be wrong is found before the first hour is spent."""
    from train.labels import read_classes
    from train.recipes import recipe_of

    if empty := [name for name in ("attacks", "doses", "seeds") if not getattr(plan, name)]:
        raise InputError(f"nothing to run: no {', no '.join(empty)}")
    for name in ("attacks", "doses", "seeds", "filters", "defenses"):
        if twice := [one for one, n in Counter(getattr(plan, name)).items() if n > 1]:
            raise InputError(f"{name}: {twice[0]} is there twice; a run counts once")
    if min(plan.seeds) < 0:
        raise InputError(f"seeds: {min(plan.seeds)}; a seed is 0 or more")
    recipe = recipe_of(plan.recipe)
    trained, asked, _ = map(list_shards, (plan.shards, plan.evaluation, plan.reference or plan.shards))
    if both := {shard.path for shard in trained} & {shard.path for shard in asked}:
        raise InputError(f"{min(both)} is among the shards that are trained on and among those of the evaluation")
    classes = read_classes(plan.classes)
    for attack in plan.attacks:
        for part in spec.parse("attacks", attack).parts():
            if part.target not in classes:
                raise InputError(f"{plan.classes}: {part.target!r}, the target of {attack}, is not among these classes")
    for dose in plan.doses:
        if not Adaptive.parse(dose):
            Dose.parse(dose)
    kept = [epoch for epoch in range(1, recipe.epochs + 1) if recipe.keeps(epoch)]
    for defense in plan.defenses:
        spec.parse("defenses", defense).by_content()  # that what it names is there
    for scores in plan.scores:
        if scores.epoch not in kept:
            raise InputError(f"scores at epoch {scores.epoch}: {plan.recipe!r} keeps checkpoints of epochs {kept}")
        entries = [spec.parse("detectors", text) for text in scores.detectors]
        for entry in entries:
            if set(EARLIER) & set(entry.needs) and not plan.earlier(scores.epoch):
                raise InputError(f"{spec.text(entry)} compares two epochs: let it score at a later one than the first")
    for arm in plan.filters:
        for detector in read_by(arm.policy):
            column(columns_of(plan, arm.epochs), detector)


if __name__ == "__main__":
    from pipeline.cli import run

    run("loop")

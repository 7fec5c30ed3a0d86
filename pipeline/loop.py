"""The whole circle over attacks x doses x (filters + defenses) x seeds.

One undefended training serves all detectors that score it, and all defenses that repair it; at dose 0 one serves all
attacks. A dose `adaptive(…)` is a bisection for each attack, arm and seed (pipeline/doses.py).

Trade-off: trainings run one after the other, each on all cores or the GPU there is, and meet in files; so a killed
loop goes on where it was and any stage can be looked at. Side by side they would gain little on few cores and need as
many models' memory. On a cluster, submit a config for each seed into the same OUT, and then the whole one, which finds
those runs done (a bisection may add the arms of a seed with which the attack fails) and makes the table.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline import spec
from pipeline.arguments import Out
from pipeline.board import Board
from pipeline.config import Config
from pipeline.doses import Adaptive, Search
from pipeline.errors import InputError
from pipeline.estimate import estimate, hours, runs_of
from pipeline.inputs import EARLIER
from pipeline.plan import Dose
from pipeline.policies._select import column
from pipeline.progress import console
from pipeline.results import FILE, write_rows
from pipeline.runs import UNDEFENDED, Arm, Run, arms_of, columns_of, read_by, source_digest
from pipeline.shards import list_shards
from pipeline.shards.store import make_folder
from train.results import judged

Made = tuple[Run, Arm, dict[str, Any]]


def loop(
    config: Annotated[str, tyro.conf.arg(metavar="CONFIG")],
    out: Out,
    /,
    *,
    dry_run: bool = False,
    max_hours: float = 72.0,
) -> int:
    """Run every attack x dose x seed of CONFIG, undefended, under every filter and every defense; resumable.

    Of doses that are bisected each arm has those that its search asks for.

    Writes OUT/results.parquet (a row a run), OUT/detectors.parquet and OUT/report.html.

    Args:
        config: TOML file; docs/formats.md describes it.
        out: folder for all runs.
        dry_run: say how many trainings there are, how many OUT has already and what the others will take; do nothing.
        max_hours: refuse to start what is estimated to take longer.
    """
    plan, folder = Config.read(config), Path(out).absolute()
    _check(plan)
    cost = estimate(plan, folder)
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
    make_folder(str(folder))
    before = _kept(plan, folder)  # a loop that is started again and stopped soon has no fewer rows than it had
    made: dict[tuple[Run, Arm], dict[str, Any]] = {}
    with Board(cost) as board:
        for run, arm, row in _made(plan, folder, board):
            made[run, arm] = row
            write_rows(folder / FILE, [*(before | made).values()])
    arms = [*made.values()]
    write_rows(folder / FILE, arms)
    _say_mixed(arms)
    runs = list(dict.fromkeys(run for run, _ in made))
    for run in runs:
        if run.watchable and (run.compares or not run.scored):  # no arm asked for it, or it was added to the config
            run.score()
    runs = [run for run in runs if run.scored]
    runs.sort(key=lambda run: run.clean)  # the report shows pictures of the first
    detectors = [row for run in runs for row in run.detectors()]
    write_rows(folder / "detectors.parquet", detectors)
    from pipeline.report.summary import write_report

    write_report(plan, runs, arms, detectors, Path(config), folder)
    return 0


def _made(plan: Config, out: Path, board: Board) -> Iterator[Made]:
    """Every row, as it is made. What cannot be poisoned as asked is found before the first training."""
    for run in _dearest(plan, out):
        run.poison()
    arms = arms_of(plan)
    for attack in plan.attacks:
        for dose in plan.doses:
            if search := Adaptive.parse(dose):
                yield from _bisected(plan, attack, search, out, board, arms)
                continue
            for seed in plan.seeds:
                run = Run(plan, attack, dose, seed, out)
                yield from ((run, arm, board.row(run, arm)) for arm in arms)


def _bisected(plan: Config, attack: str, search: Adaptive, out: Path, board: Board, arms: list[Arm]) -> Iterator[Made]:
    """Rows of one attack. Where it fails undefended with every seed, nothing can be credited, and no arm is run.

    Where it works with any, all seeds have every arm: the seeds with which an attack works are the easy ones, and a
    protection factor of those alone would be of a selection.
    """
    states = {(seed, arm): Search(search.grid) for seed in plan.seeds for arm in arms}
    made: set[tuple[str, int, Arm]] = set()

    def told(dose: str, seed: int, arm: Arm) -> Iterator[Made]:
        if (dose, seed, arm) not in made:
            made.add((dose, seed, arm))
            run = Run(plan, attack, dose, seed, out)
            row = board.row(run, arm)
            states[seed, arm].tell(dose, judged(row)[1])
            yield run, arm, row

    for seed in plan.seeds:
        while dose := states[seed, UNDEFENDED].next:
            yield from told(dose, seed, UNDEFENDED)
    if not any(states[seed, UNDEFENDED].reached for seed in plan.seeds):
        console.print(f"{attack}: not reached at {search.grid[-1]}, so no filter or defense is tried")
        return
    for seed, arm in states:
        while dose := states[seed, arm].next:
            if arm.watches:
                yield from told(dose, seed, UNDEFENDED)
            yield from told(dose, seed, arm)


def _kept(plan: Config, out: Path) -> dict[tuple[Run, Arm], dict[str, Any]]:
    """The rows that are there, by run and arm."""
    asked = ((run, arm) for run in runs_of(plan, out) for arm in arms_of(plan))
    return {(run, arm): row for run, arm in asked if (row := run.kept(arm))}


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
    for shards in (plan.shards, plan.evaluation, plan.reference or plan.shards):
        list_shards(shards)
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

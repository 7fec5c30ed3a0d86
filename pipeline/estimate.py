"""What a loop will cost, before it starts: how many trainings, how many of them OUT has already, and the hours.

Trade-off: a bisection ends where it ends, so its count is the most that it can take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.doses import Adaptive, Search
from pipeline.progress import console
from pipeline.runs import UNDEFENDED, Arm, Run, arms_of
from pipeline.shards import list_shards, uids
from train.results import judged

BESIDES = 1.5  # times bare steps: loading, scoring and rewriting, as seen with recipe `fast` on two cores
ASIDE = 20.0  # seconds more, however small the data: starts of jobs, evaluation
Training = tuple[Path, str]  # folders: of the run, and in it of the arm


@dataclass(frozen=True)
class Estimate:
    """`trainings` are the most there can be where `bisected`; `source` says how the `seconds` of one are known.

    Of which there are `parallel` at a time.
    """

    trainings: int
    done: int
    bisected: bool
    seconds: float
    source: str
    parallel: int = 1

    @property
    def left(self) -> int:
        return max(self.trainings - self.done, 0)

    @property
    def hours(self) -> float:
        """Of what is left."""
        return self.left * self.seconds / self.parallel / 3600

    def __str__(self) -> str:
        most = "at most " if self.bisected else ""
        return (
            f"{most}{self.trainings:,} trainings, {self.done:,} of them done; {most}{hours(self.hours)} left "
            f"({self.seconds:,.0f} s each{f', {self.parallel} at a time' if self.parallel > 1 else ''}, {self.source})"
        )


def runs_of(plan: Config, out: Path) -> list[Run]:
    """Every run that a loop may make, those of a bisection included."""
    doses = [dose for text in plan.doses for dose in grid_of(text)]
    return [
        Run(plan, attack, dose, seed, out)
        for attack in plan.attacks
        for dose in dict.fromkeys(doses)
        for seed in plan.seeds
    ]


def grid_of(dose: str) -> Sequence[str]:
    """A plain dose, or those of a bisection."""
    adaptive = Adaptive.parse(dose)
    return adaptive.grid if adaptive else (dose,)


def estimate(plan: Config, out: Path, parallel: int = 1) -> Estimate:
    """From what OUT holds; where it holds no training, from bare steps on this machine."""
    arms, searches = arms_of(plan), [found for dose in plan.doses if (found := Adaptive.parse(dose))]
    fixed = [dose for dose in plan.doses if not Adaptive.parse(dose)]
    done: set[Training] = set()
    spent: dict[Training, float] = {}
    wanted: set[Training] = set()
    for run in runs_of(plan, out):
        for arm in arms:
            training, row = (run.folder, arm.folder), run.kept(arm)
            if row:  # of the rows of a training, which attacks may share, the first has its seconds
                seconds = row["seconds"] * _slower(row.get("parallel", 1), parallel)
                spent[training] = max(spent.get(training, 0.0), seconds)
            if row or run.trained(arm):
                done.add(training)
            if run.dose in fixed:
                wanted.add(training)
    left = len(wanted - done)
    left += sum(_left(plan, attack, search, out, arms) for attack in plan.attacks for search in searches)
    if spent:
        seconds, source = sum(spent.values()) / len(spent), f"the mean of the {len(spent)} in OUT"
    else:
        seconds, source = _calibrated(plan, parallel)
    return Estimate(len(done) + left, len(done), bool(searches), seconds, source, parallel)


def hours(value: float) -> str:
    if value < 0.03:
        return f"{3600 * value:,.0f} seconds"
    return f"{60 * value:,.0f} minutes" if value < 1.5 else f"{value:,.1f} hours"


def _left(plan: Config, attack: str, adaptive: Adaptive, out: Path, arms: Sequence[Arm]) -> int:
    """The most trainings that the searches of an attack still take, after what OUT knows of them.

    Each arm's own, and the undefended models that some of them look through.
    """

    def kept(dose: str, seed: int, arm: Arm) -> dict[str, Any] | None:
        return Run(plan, attack, dose, seed, out).kept(arm)

    states = {(seed, arm): Search(adaptive.grid) for seed in plan.seeds for arm in arms}
    for (seed, arm), search in states.items():
        while (dose := search.next) and (row := kept(dose, seed, arm)):
            search.tell(dose, judged(row)[1])
    undefended = [states[seed, UNDEFENDED] for seed in plan.seeds]
    if not any(search.next or search.reached for search in undefended):
        return 0  # it fails with every seed: no arm is tried
    total = 0
    for seed in plan.seeds:
        mine = [(arm, states[seed, arm]) for arm in arms]
        total += sum(search.left for arm, search in mine if arm != UNDEFENDED)
        # the highest dose is asked for by the undefended search itself
        watched = sum(search.left - (not search.reached and search.left > 0) for arm, search in mine if arm.watches)
        without = sum(not kept(dose, seed, UNDEFENDED) for dose in adaptive.grid)
        total += min(without, states[seed, UNDEFENDED].left + watched)
    return total


def _calibrated(plan: Config, parallel: int) -> tuple[float, str]:
    """Seconds of a training among as many."""
    from train.pace import pairs_per_second
    from train.recipes import recipe_of

    recipe = recipe_of(plan.recipe)
    console.print(f"estimate: timing bare steps of {plan.recipe!r}, for there is no row in OUT yet", style="dim")
    pace = pairs_per_second(recipe) / _slower(1, parallel)
    pairs = sum(len(uids(shard, plan.uid)) for shard in list_shards(plan.shards))
    seconds = BESIDES * pairs * recipe.epochs / pace + ASIDE
    return (
        seconds,
        f"by bare steps of {pace:,.0f} pairs/s on this machine, times {BESIDES}, and {ASIDE:.0f} s; where other work "
        "runs, too much",
    )


def _slower(before: int, parallel: int) -> float:
    """How many times as long a training takes, at the most: cores are shared, and a GPU is not."""
    if before == parallel:
        return 1.0
    import torch

    return 1.0 if torch.cuda.is_available() else parallel / before

"""What a loop will cost, before it starts: how many trainings, how many of them OUT has already, and the hours.

Trade-off: a bisection ends where it ends, so its count is the most that it can take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.doses import Adaptive
from pipeline.runs import Arm, Run, arms_of
from pipeline.shards import list_shards, uids

BESIDES = 1.5  # times bare steps: loading, scoring, rewriting and evaluation, as seen with recipe `fast` on two cores


@dataclass(frozen=True)
class Estimate:
    """`trainings` are the most there can be where `bisected`; `source` says how the `seconds` of one are known."""

    trainings: int
    done: int
    bisected: bool
    seconds: float
    source: str

    @property
    def left(self) -> int:
        return max(self.trainings - self.done, 0)

    @property
    def hours(self) -> float:
        """Of what is left."""
        return self.left * self.seconds / 3600

    def __str__(self) -> str:
        most = "at most " if self.bisected else ""
        return (
            f"{most}{self.trainings:,} trainings, {self.done:,} of them done; {most}{hours(self.hours)} left "
            f"({self.seconds:,.0f} s each, {self.source})"
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


def estimate(plan: Config, out: Path) -> Estimate:
    """From what OUT holds; where it holds no training, from bare steps on this machine."""
    arms, searches = arms_of(plan), [found for dose in plan.doses if (found := Adaptive.parse(dose))]
    fixed = [dose for dose in plan.doses if not Adaptive.parse(dose)]
    folders = {run.folder for run in runs_of(plan, out) if run.dose in fixed}
    trainings = len(folders) * len(arms)
    trainings += sum(_at_most(search, arms) for search in searches) * len(plan.attacks) * len(plan.seeds)
    rows = {(run.folder, arm.folder): row for run in runs_of(plan, out) for arm in arms if (row := run.kept(arm))}
    if rows:
        seconds, source = _mean(list(rows.values())), f"the mean of the {len(rows)} in OUT"
    else:
        seconds, source = _calibrated(plan)
    return Estimate(trainings, len(rows), bool(searches), seconds, source)


def hours(value: float) -> str:
    return f"{60 * value:,.0f} minutes" if value < 1.5 else f"{value:,.1f} hours"


def _at_most(search: Adaptive, arms: Sequence[Arm]) -> int:
    """Of one attack and seed: each arm's own runs, and the undefended models that some of them look through."""
    watching = sum(arm.watches for arm in arms)
    undefended = min(len(search.grid), search.steps + watching * (search.steps - 1))
    return undefended + (len(arms) - 1) * search.steps


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["seconds"] for row in rows) / len(rows)


def _calibrated(plan: Config) -> tuple[float, str]:
    from train.pace import pairs_per_second
    from train.recipes import recipe_of

    recipe = recipe_of(plan.recipe)
    pace, pairs = pairs_per_second(recipe), sum(len(uids(shard, plan.uid)) for shard in list_shards(plan.shards))
    seconds = BESIDES * pairs * recipe.epochs / pace
    return (
        seconds,
        f"by bare steps of {pace:,.0f} pairs/s on this machine, times {BESIDES}, for OUT has no training yet",
    )

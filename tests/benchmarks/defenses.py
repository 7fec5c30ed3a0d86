"""The table of docs/results/defenses.md: every defense, and filters at equal data, against every attack.

    python -m tests.benchmarks.defenses CONFIG RESULTS...

of the results.parquet of `mithridate loop CONFIG OUT`, or of several loops of a part of CONFIG each. A cell is the mean
over the seeds with a 95% interval over seeds and images (bootstrap of the seeds, widened for their small number). What
is not about one attack is a mean over the attacks too. `cost` is core-seconds of training, with those of the model that
is repaired or looked through and of the filter, over those of the undefended training.
"""

import sys
from collections.abc import Sequence
from typing import Any

from pipeline import spec
from pipeline.config import Config
from pipeline.results import read
from pipeline.runs import UNDEFENDED, Arm, arms_of, read_by
from tests.benchmarks.detectors import over_seeds
from train.results import judged

CLEAN = {"zeroshot_top1": "zero-shot top-1", "probe_top1": "probe top-1", "knn_top1": "kNN top-1"}
POISONED = {"triggered_accuracy": "true class, triggered", "asr_knn": "success by kNN"}
Row = dict[str, Any]


def main(config: str, *results: str) -> None:
    """Print success by arm and attack, what each arm knows of clean and of triggered images, and what it costs."""
    plan, rows = Config.read(config), [row for path in results for row in read(path)]
    seeds = sorted({row["seed"] for row in rows})
    print(f"seeds {', '.join(map(str, seeds))}; an arm of an attack with fewer says how many\n")
    print(f"| arm | {' | '.join(f'`{attack}`' for attack in plan.attacks)} | cost |")
    print("|---|" + "---|" * (len(plan.attacks) + 1))
    of_arm = {arm: [row for row in rows if _is(row, arm)] for arm in arms_of(plan)}
    plain = {(row["attack"], row["seed"]): row["train_cpu_seconds"] for row in of_arm[UNDEFENDED]}
    for arm, found in of_arm.items():
        cells = [_success([row for row in found if row["attack"] == attack], len(seeds)) for attack in plan.attacks]
        print(f"| {_called(arm)} | {' | '.join(cells)} | {_cost(plain, arm, found)} |")
    columns = {**CLEAN, **POISONED}
    print(f"\n| arm | {' | '.join(columns.values())} |\n|---|{'---|' * len(columns)}")
    for arm, found in of_arm.items():
        print(f"| {_called(arm)} | {' | '.join(_mean(found, name) for name in columns)} |")


def _is(row: Row, arm: Arm) -> bool:
    policy, when = (arm.filter.policy, arm.filter.when) if arm.filter else (None, None)
    return (row["policy"], row["when"], row["defense"]) == (policy, when, arm.defense)


def _success(found: Sequence[Row], seeds: int) -> str:
    rates = []
    for row in found:
        name, value = judged(row)
        rates.append((float(value or 0), float(row[f"{name}_low"]), float(row[f"{name}_high"])))
    return _cell(rates) + (f", {len(rates)} seed{'s' * (len(rates) > 1)}" if 0 < len(rates) < seeds else "")


def _mean(found: Sequence[Row], name: str) -> str:
    """Over seeds of the mean over attacks that have the measure."""
    rates = []
    for seed in sorted({row["seed"] for row in found}):
        mine = [row for row in found if row["seed"] == seed and row.get(f"{name}_n")]
        if mine:
            rates.append(tuple(sum(row[name + end] for row in mine) / len(mine) for end in ("", "_low", "_high")))
    return _cell(rates)


def _cell(rates: Sequence[tuple[float, ...]]) -> str:
    if not rates:
        return "–"
    mean, low, high = over_seeds([(value, low, high) for value, low, high in rates])
    return f"{100 * mean:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _cost(plain: dict[tuple[str, int], float], arm: Arm, found: Sequence[Row]) -> str:
    """Core-seconds, since the machine may not be idle."""
    ratios = []
    for row in found:
        spent, undefended = row["train_cpu_seconds"], plain[row["attack"], row["seed"]]
        filtering = row["filter_cpu_seconds_per_million"] if arm.filter else 0.0
        if spent is not None and filtering is not None:  # rows of other code may lack them
            spent += filtering * 1e-6 * row["samples"]
            ratios.append((spent + undefended * arm.watches) / undefended)
    return f"{sum(ratios) / len(ratios):.2f}" if ratios else "–"


def _called(arm: Arm) -> str:
    if arm.filter:
        names = read_by(arm.filter.policy)
        name = f"`{names[0]}`" if len(names) == 1 else f"ensemble of `{'`, `'.join(names)}`"
        return f"filter {name}, {arm.filter.when}"
    if not arm.defense:
        return "**undefended**"
    return f"`{arm.name}`" + (", repairs" if spec.parse("defenses", arm.defense).needs_init else "")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Does a rule that canaries chose find attacks of a family that they were not of?

    python -m tests.benchmarks.ensemble CONFIG OUT CALIBRATION [CALIBRATION …]

OUT is of `mithridate loop CONFIG OUT`, each CALIBRATION of `mithridate calibrate` with the same detectors at the same
epochs; the i-th belongs to the i-th seed. The models that rules are chosen on have met every canary family at once,
those that they are judged on one attack alone. To each attack the rule is applied that was chosen without its family;
beside it the rule chosen on all families, the best single detector without the family, and random removal.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import ledger, spec
from pipeline.calibrate import collect
from pipeline.choice import Canaries, Rule
from pipeline.config import Config
from pipeline.policies._select import column
from pipeline.runs import Run
from pipeline.scored import Scored
from pipeline.shards import list_shards
from tests.benchmarks.detectors import over_seeds

DROP = 0.1
RANDOM = "random(seed=0)"
RULES: dict[str, Callable[[dict[str, Any], str], Rule]] = {
    "ensemble, family held out": lambda found, family: _rule(_held_out(found, family)["policy"]),
    "best single detector, family held out": lambda found, family: Rule((_held_out(found, family)["single"],)),
    "ensemble, all families": lambda found, _: _rule(found["policy"]),
    "random": lambda *_: Rule((RANDOM,)),
}


def main(config: str, out: str, *calibrations: str) -> None:
    """Print recall at DROP removed, by attack and rule, with an interval over seeds and poisons; and the rules."""
    plan = Config.read(config)
    found = [json.loads(Path(folder, "calibration.json").read_text()) for folder in calibrations]
    lines: dict[str, list[str]] = {name: [] for name in RULES}
    worst = dict.fromkeys(RULES, 1.0)
    for attack in plan.attacks:
        rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in RULES}
        for seed, chosen in zip(plan.seeds, found, strict=True):
            table, family = _table(plan, attack, seed, out), spec.innermost(attack)
            for name, rule in RULES.items():
                (rate,) = table.recalls(_named(rule(chosen, family), table), family, (DROP,))
                rates[name].append((float(rate.value or 0), float(rate.low or 0), float(rate.high or 0)))
        for name, found_here in rates.items():
            mean, low, high = over_seeds(found_here)
            worst[name] = min(worst[name], mean)
            lines[name].append(f"{mean:.3f} ({low:.2f}–{high:.2f})")
    print(f"| rule | worst | {' | '.join(f'`{attack}`' for attack in plan.attacks)} |")
    print("|---|---|" + "---|" * len(plan.attacks))
    for name, cells in lines.items():
        print(f"| {name} | {worst[name]:.3f} | {' | '.join(cells)} |")
    for seed, chosen in zip(plan.seeds, found, strict=True):
        print(f"\nSeed {seed}, all families: `{chosen['policy']}`")
        for one in chosen["held_out"]:
            print(f"- without {one['family']}: `{one['policy']}`")


def _table(plan: Config, attack: str, seed: int, out: str) -> Canaries:
    (dose,) = plan.doses
    run = Run(plan, attack, dose, seed, Path(out).absolute())
    scored = Scored(tuple(run.scores_of(scores) for scores in plan.scores))
    poisons = ledger.poisoned_uids(ledger.ledger_path(run.poisoned))
    return collect(scored, list_shards(run.poisoned), dict.fromkeys(poisons, spec.innermost(attack)), seed)


def _named(rule: Rule, table: Canaries) -> Rule:
    """The rule with the columns of the loop, where who reads no embeddings was scored at another epoch."""
    names = [name if name in table.columns else name.partition(":")[2] or name for name in rule.detectors]
    return replace(rule, detectors=tuple(column(table.columns, name) for name in names))


def _held_out(found: dict[str, Any], family: str) -> dict[str, Any]:
    return next(one for one in found["held_out"] if one["family"] == family)


def _rule(policy: str) -> Rule:
    parsed = spec.parse("policies", policy)
    if len(parsed.detectors) == 1:
        return Rule(parsed.detectors)
    return Rule(parsed.detectors, parsed.weights, parsed.combine)


if __name__ == "__main__":
    main(*sys.argv[1:])

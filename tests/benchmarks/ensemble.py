"""Does a rule that canaries chose find attacks of a family that they were not of?

    python -m tests.benchmarks.ensemble CONFIG OUT

OUT is of `mithridate loop CONFIG OUT`, with two seeds or more. As `mithridate calibrate` does, rules are chosen on one
attack of each family (CANARIES), each through a model of its own, at the dose of the config: on the runs of one seed.
They are judged on the runs of the next one: other poisons, other weights, another order. To each attack the rule is
applied that was chosen without its family; beside it the rule chosen on all families, the best single detector without
the family, and random removal. Once with all detectors and once without COUNTING, whose success is a fact of this data
as much as of the attacks.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import ledger, spec
from pipeline.calibrate import collect
from pipeline.choice import Canaries, Rule, choose, held_out
from pipeline.config import Config
from pipeline.runs import Run
from pipeline.scored import Scored
from pipeline.shards import list_shards
from tests.benchmarks.detectors import over_seeds

DROP, MOST = 0.1, 4
CANARIES = (
    "patch(target='banana', size=48)",
    "blended(target='banana', pattern='stripes')",
    "sig(target='banana')",
    "targeted(target='banana', images=16)",
    "word(target='woman', words='as seen on the moon')",
)
REFERENCES = ("random", "oracle")
COUNTING = (
    "caption_frequency",
    "caption_template",
    "image_copies",
    "image_duplicates",
    "recurring_patch",
    "frequency_residue",
    "encoding_outlier",
    "text_based",
)
Rates = dict[str, list[tuple[float, float, float]]]  # by attack: recall and its interval, a seed after the other


def main(config: str, out: str) -> None:
    """Print recall at DROP removed, by rule and attack, with an interval over seeds and poisons; and the rules."""
    plan = Config.read(config)
    if len(plan.seeds) < 2:
        raise SystemExit(f"{config}: a rule is judged on another seed than it was chosen on; give two or more")
    tables = {seed: [_table(plan, attack, seed, out) for attack in plan.attacks] for seed in plan.seeds}
    for title, left_out in (("All detectors", REFERENCES), ("Without counting", (*REFERENCES, *COUNTING))):
        print(f"\n{title}\n")
        told = _judged(plan.seeds, tables, left_out)
        print(f"| rule | judged on seed | worst | {' | '.join(f'`{attack}`' for attack in plan.attacks)} |")
        print("|---|---|---|" + "---|" * len(plan.attacks))
        for name, rates in told.items():
            for i, seed in enumerate(plan.seeds):
                _line(name, str(seed), [found[i][0] for found in rates.values()])
            means = [over_seeds(found) for found in rates.values()]
            cells = [f"{mean:.3f} ({low:.2f}–{high:.2f})" for mean, low, high in means]
            print(f"| {name} | mean | {min(mean for mean, _, _ in means):.3f} | {' | '.join(cells)} |")
    for seed in plan.seeds:
        _line("random", str(seed), [_recall(table, _named("random", table))[0] for table in tables[seed]])


def _judged(seeds: Sequence[int], tables: dict[int, list[Canaries]], left_out: Sequence[str]) -> dict[str, Rates]:
    told: dict[str, Rates] = {}
    for at, seed in enumerate(seeds):
        shown = [_without(table, left_out) for table in tables[seeds[at - 1]] if table.attack in CANARIES]
        several, single, everything = held_out(shown, DROP, MOST), held_out(shown, DROP, 1), choose(shown, DROP, MOST)
        print(f"chosen on seed {seeds[at - 1]}, all families: `{everything.policy(DROP)}`")
        for family, rule in several.items():
            print(f"- without {family}: `{rule.policy(DROP)}`; single: `{single[family].detectors[0]}`")
        print()
        for table in tables[seed]:
            rules = {
                "ensemble, family held out": several[table.family],
                "best single detector, family held out": single[table.family],
                "ensemble, all families": everything,
            }
            for name, rule in rules.items():
                told.setdefault(name, {}).setdefault(table.attack, []).append(_recall(table, rule))
    return told


def _table(plan: Config, attack: str, seed: int, out: str) -> Canaries:
    (dose,) = plan.doses
    run = Run(plan, attack, dose, seed, Path(out).absolute())
    scored = Scored(tuple(run.scores_of(scores) for scores in plan.scores))
    poisons = ledger.poisoned_uids(ledger.ledger_path(run.poisoned))
    return collect(scored, list_shards(run.poisoned), attack, poisons, seed)


def _without(table: Canaries, detectors: Sequence[str]) -> Canaries:
    """The table without the columns of these detectors."""
    kept = [i for i, name in enumerate(table.columns) if _name(name) not in detectors]
    return replace(table, columns=tuple(table.columns[i] for i in kept), scores=table.scores[:, kept])


def _name(column: str) -> str:
    return spec.parse_call(column.partition(":")[2])[0]


def _named(detector: str, table: Canaries) -> Rule:
    return Rule((next(name for name in table.columns if _name(name) == detector),))


def _recall(table: Canaries, rule: Rule) -> tuple[float, float, float]:
    (rate,) = table.recalls(rule, (DROP,))
    return float(rate.value or 0), float(rate.low or 0), float(rate.high or 0)


def _line(name: str, seed: str, recalls: Sequence[float]) -> None:
    print(f"| {name} | {seed} | {min(recalls):.3f} | {' | '.join(f'{value:.3f}' for value in recalls)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The table of docs/results/detectors.md: every detector at every epoch against every attack, of a `mithridate loop`.

`python -m tests.benchmarks.detectors OUT …` after `mithridate loop docs/results/filters.toml OUT`, or one OUT a seed. A
cell is the mean over the seeds with a 95% interval over seeds and poisons; the order is that of the worst attack.
"""

import sys
from collections.abc import Sequence

import polars as pl

from pipeline import spec
from pipeline.bioassay import mean_over_seeds

MEASURES = {"recall_at_10": "recall at 10% removed", "recall_at_1": "recall at 1% removed", "auroc": "AUROC"}
OTHERS = ("auprc", "fpr_at_95", "fpr_at_100", "precision_at_100ppm", "recall_at_0.1", "recall_at_5")


def main(*outs: str) -> None:
    """Print a table for each measure, and the means of the others."""
    rows = pl.concat([pl.read_parquet(f"{out}/detectors.parquet") for out in outs], how="diagonal")
    assert rows.select("attack", "detector", "when", "seed").is_unique().all(), "several doses or pools"
    for measure, title in MEASURES.items():
        print(f"\n### {title[0].upper()}{title[1:]}\n")
        _table(rows, measure)
    print("\n### The other measures, mean over attacks and seeds\n")
    print(f"| detector | when | {' | '.join(OTHERS)} |\n|---|---|{'---|' * len(OTHERS)}")
    for (detector, when), group in sorted(rows.group_by("detector", "when"), key=lambda item: item[0]):
        cells = [f"{group[name].mean():.3f}" for name in OTHERS]
        print(f"| `{_short(detector)}` | {when} | {' | '.join(cells)} |")


def _table(rows: pl.DataFrame, measure: str) -> None:
    attacks = rows["attack"].unique(maintain_order=True).to_list()
    print(f"| detector | when | worst | {' | '.join(f'`{attack}`' for attack in attacks)} |")
    print("|---|---|---|" + "---|" * len(attacks))
    lines: list[tuple[float, str]] = []
    for (detector, when), group in rows.group_by("detector", "when"):
        found = [group.filter(pl.col("attack") == attack) for attack in attacks]
        means = [float(part[measure].mean()) for part in found]
        cells = [_cell(part, measure) for part in found]
        lines.append((min(means), f"| `{_short(detector)}` | {when} | {min(means):.2f} | {' | '.join(cells)} |"))
    print("\n".join(line for _, line in sorted(lines, reverse=True)))


def _cell(part: pl.DataFrame, measure: str) -> str:
    found = part.select(measure, f"{measure}_low", f"{measure}_high").rows()
    return "{:.2f} ({:.2f}–{:.2f})".format(*over_seeds(found))


def over_seeds(found: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of shares with a 95% interval, of (value, low, high) of each seed; these are over its poisons alone."""
    mean, low, high = mean_over_seeds([[(value, ((high - low) / 3.92) ** 2)] for value, low, high in found])
    return mean, max(low, 0.0), min(high, 1.0)


def _short(detector: str) -> str:
    """The spec without what is as by default."""
    return spec.key(spec.parse("detectors", detector)).removesuffix("()")


if __name__ == "__main__":
    main(*sys.argv[1:])

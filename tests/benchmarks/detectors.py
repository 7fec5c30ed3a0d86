"""The table of docs/results/filters.md: every detector at every epoch against every attack, of a `mithridate loop`.

`python -m tests.benchmarks.detectors OUT` after `mithridate loop docs/results/filters.toml OUT`. Recall is pooled over
the seeds, with Wilson's interval over all their poisons; the order is that of the worst attack.
"""

import sys

import polars as pl

from pipeline import spec
from train.metrics import wilson

MEASURES = {"recall_at_10": "recall at 10% removed", "recall_at_1": "recall at 1% removed", "auroc": "AUROC"}
OTHERS = ("auprc", "fpr_at_95", "fpr_at_100", "precision_at_100ppm", "recall_at_0.1", "recall_at_5")


def main(out: str) -> None:
    """Print a table for each measure, and the means of the others."""
    rows = pl.read_parquet(f"{out}/detectors.parquet")
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
    mean, low, high = (f(part[measure]) for f in (pl.Series.mean, pl.Series.min, pl.Series.max))
    if measure != "auroc":  # seeds differ in who is poisoned, so their poisons are pooled
        n = int(part["poisons"].sum())
        low, high = wilson(round(float((part[measure] * part["poisons"]).sum())), n)
    return f"{mean:.2f} ({low:.2f}–{high:.2f})"


def _short(detector: str) -> str:
    """The spec without what is as by default in most of them."""
    return spec.key(spec.parse("detectors", detector)).removesuffix("()")


if __name__ == "__main__":
    main(sys.argv[1])

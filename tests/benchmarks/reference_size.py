"""Tables and figure of docs/results/reference_size.md: what density detectors find, by size of the pool, k and dose.

    python -m tests.benchmarks.reference_size FIGURE OUT …

after `mithridate loop docs/results/reference_size.toml OUT`, or one OUT a seed. A cell is the mean over the seeds with
a 95% interval over seeds and poisons.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline import spec
from pipeline.report.figures import COLOURS, STYLE, save
from tests.benchmarks.detectors import over_seeds

MEASURES = {"auroc": "AUROC", "recall_at_10": "recall at 10% removed"}
Place = tuple[float, float, float]  # value and interval


def main(figure: str, *outs: str) -> None:
    """Print a table a measure and dose, and write FIGURE.svg and FIGURE.png."""
    rows = pl.concat([pl.read_parquet(f"{out}/detectors.parquet") for out in outs], how="diagonal")
    called = [spec.parse_call(text) for text in rows["detector"]]
    rows = rows.with_columns(
        pl.Series("called", [name for name, _ in called]), pl.Series("k", [options["k"] for _, options in called])
    )
    seeds = ", ".join(map(str, sorted(rows["seed"].unique())))
    for measure, title in MEASURES.items():
        for (ppm,), group in sorted(rows.group_by("dose_ppm"), key=lambda item: item[0]):
            print(f"\n### {title[0].upper()}{title[1:]}, {_percent(ppm)} poisoned (seeds {seeds})\n")
            _table(group, measure)
    save(_drawn(rows), Path(figure))


def _table(rows: pl.DataFrame, measure: str) -> None:
    pools = sorted(rows["pool"].unique())
    print(f"| detector | {' | '.join(f'pool {pool:,}' for pool in pools)} |\n|---|{'---|' * len(pools)}")
    for name in rows["called"].unique(maintain_order=True):
        for k in sorted(rows["k"].unique()):
            found = [_over_seeds(rows, measure, called=name, k=k, pool=pool) for pool in pools]
            print(f"| `{name}(k={k})` | {' | '.join('{:.2f} ({:.2f}–{:.2f})'.format(*one) for one in found)} |")


def _over_seeds(rows: pl.DataFrame, measure: str, **wanted: Any) -> Place:
    """Of the rows that are as wanted, one a seed."""
    part = rows.filter(**wanted)
    assert part["seed"].is_unique().all(), wanted
    return over_seeds(part.select(measure, f"{measure}_low", f"{measure}_high").rows())


def _drawn(rows: pl.DataFrame) -> Figure:
    """AUROC over k ÷ the poisons that are to be expected in the pool: a panel a detector, a colour a dose."""
    names, doses = rows["called"].unique(maintain_order=True).to_list(), sorted(rows["dose_ppm"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * len(names) + 0.5, 2.3), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
            for ppm, colour in zip(doses, COLOURS, strict=False):
                _points(axes, rows.filter(called=name, dose_ppm=ppm), colour, _percent(ppm))
            axes.axhline(0.5, color="#BBBBBB", lw=0.6, zorder=0)
            axes.axvline(1, color="#BBBBBB", lw=0.6, zorder=0)
            axes.set(xscale="log", ylim=(0, 1), xlabel="k ÷ poisons in the pool")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title(name, fontsize=8, family="monospace")
        figure.axes[0].set_ylabel("AUROC")
        figure.axes[-1].legend(frameon=False, fontsize=7, loc="lower right", handletextpad=0.2, title="poisoned")
    return figure


def _points(axes: Axes, rows: pl.DataFrame, colour: str, label: str) -> None:
    found = []
    for (k, pool), part in rows.group_by("k", "pool"):
        expected = min(pool, part["n"].item(0)) * part["dose_ppm"].item(0) / 1e6
        found.append((k / expected, *_over_seeds(rows, "auroc", k=k, pool=pool)))
    at, value, low, high = zip(*found, strict=True)
    axes.vlines(at, low, high, color=colour, lw=0.6, alpha=0.5)
    axes.plot(at, value, "o", ms=3.4, color=colour, mec="white", mew=0.3, label=label)


def _percent(ppm: float) -> str:
    return f"{ppm / 1e4:.2g}%"


if __name__ == "__main__":
    main(*sys.argv[1:])

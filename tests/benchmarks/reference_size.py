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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

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
            print(f"\n### {title[0].upper()}{title[1:]}, {ppm / 1e4:g}% poisoned (seeds {seeds})\n")
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
    """AUROC over the size of the pool: a column a detector, a row a dose, a line a k."""
    names, doses = rows["called"].unique(maintain_order=True).to_list(), sorted(rows["dose_ppm"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * len(names) + 0.6, 1.5 * len(doses) + 0.5), layout="constrained")
        grid = figure.subplots(len(doses), len(names), squeeze=False, sharex=True, sharey=True)
        for line, ppm in zip(grid, doses, strict=True):
            for axes, name in zip(line, names, strict=True):
                _panel(axes, rows.filter(called=name, dose_ppm=ppm))
            line[0].set_ylabel(f"AUROC, {ppm / 1e4:g}% poisoned")
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, fontsize=8, family="monospace")
        for axes in grid[-1]:
            axes.set_xlabel("pairs in the pool")
        grid[0][-1].legend(frameon=False, fontsize=7, loc="lower right", handlelength=1.2)
    return figure


def _panel(axes: Axes, rows: pl.DataFrame) -> None:
    pools = sorted(rows["pool"].unique())
    for place, (k, colour) in enumerate(zip(sorted(rows["k"].unique()), COLOURS, strict=False)):
        found = [_over_seeds(rows, "auroc", k=k, pool=pool) for pool in pools]
        beside = [pool * 1.06 ** (place - 1) for pool in pools]  # so that intervals do not hide each other
        axes.vlines(beside, [one[1] for one in found], [one[2] for one in found], color=colour, lw=0.8, alpha=0.7)
        axes.plot(beside, [one[0] for one in found], "o-", ms=3, lw=1.1, color=colour, label=f"k = {k}")
    axes.axhline(0.5, color="#BBBBBB", lw=0.6, zorder=0)
    axes.set(xscale="log", ylim=(0, 1))
    axes.xaxis.set_major_locator(FixedLocator(pools))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main(*sys.argv[1:])

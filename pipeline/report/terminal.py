"""The two tables of the page in a terminal, readable at 100 columns: each number above its interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.tables import (
    BUDGETS,
    MEASURES,
    Group,
    Row,
    arm_groups,
    caveat,
    detector_groups,
    main_measures,
    measured,
)

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console


def print_tables(arms: "pl.DataFrame", detectors: "pl.DataFrame", console: "Console") -> None:
    """Print what each arm achieves and what each detector finds, one table per attack and dose."""
    if groups := arm_groups(arms):
        for group in groups:
            console.print(_arms(group, main_measures(groups)))
        console.print(Text(caveat(groups), "dim"))
        console.print()
    for group in (groups := detector_groups(detectors)):
        console.print(_detectors(group, measured(groups, BUDGETS)))


def _arms(group: Group, measures: Sequence[str]) -> Table:
    table = _table(group, "arm")
    table.add_column("poison\nleft", justify="right")
    for measure in measures:
        table.add_column(MEASURES[measure][0].replace(" ", "\n", 1), justify="right")
    table.add_column("filter", justify="right")
    table.add_column("train", justify="right")
    for row in group.rows:
        left = Text(row.texts["poisons_left"])
        if row.texts["poisons_in"]:
            left.append(f"\nof {row.texts['poisons_in']}", "dim")
        table.add_row(
            _name(row), left, *(_rate(row, m) for m in measures), _bare(row.texts["filter"]), _bare(row.texts["train"])
        )
    return table


def _detectors(group: Group, budgets: Sequence[str]) -> Table:
    table = _table(group, "detector")
    table.add_column("AUROC", justify="right")
    table.add_column("AUPRC", justify="right")
    for measure in budgets:
        table.add_column(f"recall at\n{BUDGETS[measure]}% removed", justify="right")
    table.add_column("per sample", justify="right")
    for row in group.rows:
        auprc = _bare(row.texts["auprc"])
        table.add_row(
            _name(row), _rate(row, "auroc"), auprc, *(_rate(row, m) for m in budgets), _bare(row.texts["per_sample"])
        )
    return table


def _table(group: Group, first: str) -> Table:
    title = Text(group.attack or "no attack", "bold").append(f"  {group.dose}", "not bold")
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(first, overflow="fold", max_width=28)
    return table


def _name(row: Row) -> Text:
    """Names are data: a Text is never read as markup."""
    name = Text(row.name)
    for note in row.notes:
        name.append(f"\n{note}", "dim")
    return name


def _rate(row: Row, measure: str) -> Text:
    rate = row.rates.get(measure)
    if rate is None:
        return Text("–", "dim")
    number, interval = (
        (rate.decimal, rate.decimal_interval) if measure == "auroc" else (rate.percent, rate.percent_interval)
    )
    text = Text(number)
    if interval:
        text.append(f"\n{interval}", "dim")
    if rate.ceiling is not None:
        text.append(f"\nof ≤ {100 * rate.ceiling:.0f}%", "dim")
    return text


def _bare(text: str) -> Text:
    return Text(text) if text else Text("–", "dim")

"""How far a loop is: a live table in a terminal, a line after each training in a log.

Trade-off: an arm counts as a whole, so what is left is told in trainings and not in their epochs; the bar of the
training itself runs above the table.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from pipeline.estimate import Estimate, hours
from pipeline.progress import console
from pipeline.runs import Arm, Run

MARK = {"done": "●", "running": "◐"}


class Board(AbstractContextManager["Board"]):
    """One row an attack: how many arms are done, and which run."""

    def __init__(self, cost: Estimate):
        self.cost, self.begin = cost, time.monotonic()
        self.done: dict[str, list[dict[str, Any]]] = {}
        self.running: dict[tuple[Run, Arm], None] = {}  # in the order in which they began
        self.spent: list[float] = []  # seconds of what was made by this command
        self.left = cost.left
        self.live = (
            Live(get_renderable=self.table, console=console, refresh_per_second=1) if console.is_terminal else None
        )

    def __enter__(self) -> "Board":
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.__exit__(kind, error, trace)

    def row(self, run: Run, arm: Arm, make: Callable[[Run, Arm], dict[str, Any]]) -> dict[str, Any]:
        """The row of an arm, shown as running while it is made."""
        there, trained = run.kept(arm), run.trained(arm)
        self.running[run, arm] = None
        row = there or make(run, arm)
        del self.running[run, arm]
        self.done.setdefault(run.attack, []).append(row)
        if there is None:
            if not trained:  # at dose 0 the attacks after the first are only asked
                self.spent.append(row["seconds"])
                self.left = max(self.left - 1, 0)
            if not self.live:
                console.print(f"loop: {self.headline()}")
        return row

    def headline(self) -> str:
        """How many are done, and how long the others will take by those of this command."""
        most = "at most " if self.cost.bisected else ""
        each = sum(self.spent) / len(self.spent) if self.spent else self.cost.seconds
        gone = hours((time.monotonic() - self.begin) / 3600)
        done = sum(map(len, self.done.values()))
        left = f"{most}{self.left:,} left, {most}{hours(self.left * each / self.cost.parallel / 3600)}"
        return f"{done:,} arms done, {left}; {gone} gone"

    def table(self) -> Table:
        """Arms done by attack, newest last, and what runs now."""
        table = Table(title=self.headline(), title_justify="left", box=None, header_style="bold")
        for head in ("attack", "done", "running"):
            table.add_column(head, justify="right" if head == "done" else "left", overflow="fold")
        running: dict[str, list[str]] = {}
        for run, arm in [*self.running]:
            running.setdefault(run.attack, []).append(f"{MARK['running']} {arm.name}, dose {run.dose}, seed {run.seed}")
        for attack in dict.fromkeys([*self.done, *running]):
            done = f"{MARK['done']} {len(self.done.get(attack, []))}"
            table.add_row(attack, done, "\n".join(running.get(attack, [])))
        return table

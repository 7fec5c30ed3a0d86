"""Progress of long work: a live bar in a terminal, a line every ten seconds in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.errors import InputError

console = Console(highlight=False, stderr=True, soft_wrap=True, markup=False)
LOG_EVERY = 10.0


def run_stage(job: str, name: str, about: str, verb: Callable[..., int], *arguments: str, **options: Any) -> None:
    """Another verb as a stage of a job that is resumed by the same command. Raises InputError where it fails."""
    console.rule(f"{name}{about}", align="left")
    if code := verb(*arguments, **options):
        raise InputError(f"{job}: stage {name!r} ended with {code}; the same command goes on from there")


class _Meter:
    def __init__(self, label: str, total: int, bar: Progress | None):
        self.label, self.total, self.bar = label, total, bar
        self.done = self.samples = 0
        self.begin = self.logged = time.monotonic()
        self.task = bar.add_task(label, total=total, rate="") if bar else None

    def advance(self, samples: int) -> None:
        self.done += 1
        self.samples += samples
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=1, rate=self.rate())
        elif now - self.logged >= LOG_EVERY and self.done < self.total:
            self.logged = now
            left = (now - self.begin) / self.done * (self.total - self.done)
            console.print(f"{self.label}: {self.done}/{self.total}{self.rate()}, {left:.0f} s left")

    def rate(self) -> str:
        """Nothing of what counts no samples, such as trainings."""
        return f" shards, {self.pace()}" if self.samples else ""

    def pace(self) -> str:
        return f"{self.samples / max(time.monotonic() - self.begin, 1e-9):,.0f} samples/s"


@contextmanager
def meter(label: str, total: int) -> Iterator[_Meter]:
    """Count shards and samples; ends with one line that stays."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=console) as bar:
            yield (counter := _Meter(label, total, bar))
    else:
        yield (counter := _Meter(label, total, None))
    seconds = time.monotonic() - counter.begin
    what = f" shards, {counter.samples:,} samples" if counter.samples else ""
    pace = f", {counter.pace()}" if counter.samples else ""
    console.print(f"{label}: {counter.done}{what} in {seconds:.1f} s{pace}")

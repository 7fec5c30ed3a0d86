"""Progress of a training run: a live bar in a terminal, one line an epoch in a log, and events for TensorBoard.

Trade-off: the events are for who watches; curve.parquet, which is written whole, is what others read. A resumed run
writes another file of events and says which steps of the files before it purges.
"""

import time
from types import TracebackType

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX import SummaryWriter

from pipeline.progress import console


class Progress:
    """Counts steps; a resumed run starts at `done`. Shown by the one rank that has `events` to write."""

    def __init__(self, epochs: int, steps: int, done: int, events: SummaryWriter | None):
        self.epochs, self.steps, self.show = epochs, steps, events is not None
        self.left = epochs * steps - done
        self.bar: Bar | None = None
        self.events = events
        if self.show and console.is_terminal and self.left:
            columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("loss {task.fields[loss]}"))
            self.bar = Bar(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("", total=epochs * steps, completed=done, epoch="", loss="", rate="")
        self.begin = self.epoch_begin = time.monotonic()
        self.taken = 0
        self.losses: list[float] = []
        self.pairs = 0

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        if self.events:
            self.events.close()

    def advance(self, step: int, epoch: int, loss: float, lr: float, pairs: int, last: bool) -> None:
        """A step of `pairs` pairs is done; after the last of an epoch, a line gives the mean loss of its steps."""
        if self.events:
            self.events.add_scalar("train/loss", loss, step)
            self.events.add_scalar("train/lr", lr, step)
        self.losses.append(loss)
        self.pairs += pairs
        self.taken += 1
        now = time.monotonic()
        rate = f"{self.pairs / max(now - self.epoch_begin, 1e-9):,.0f} pairs/s"
        if self.bar:
            self.bar.update(self.task, advance=1, epoch=f"{epoch}/{self.epochs}", loss=f"{loss:.3f}", rate=rate)
        if last:
            left = (now - self.begin) / self.taken * (self.left - self.taken)
            mean = sum(self.losses) / len(self.losses)
            if self.show:
                eta = f"{left // 60:.0f}:{left % 60:02.0f}"
                console.print(f"epoch {epoch}/{self.epochs}  loss {mean:.3f}  {rate}  ETA {eta}")
            self.losses, self.pairs, self.epoch_begin = [], 0, now

    def validated(self, step: int, loss: float) -> None:
        """The loss on held-out pairs after an epoch's last step."""
        if self.events:
            self.events.add_scalar("validation/loss", loss, step)
            console.print(f"held-out loss {loss:.3f}")

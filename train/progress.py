"""Progress of a training run: a live bar in a terminal, one line an epoch in a log, and events for TensorBoard.

Trade-off: the events are for who watches; curve.parquet, which is written whole, is what others read. A resumed run
writes another file of events and says which steps of the files before it purges. The loop writes events itself, a few
microseconds each: a thread that dies of a full disk, as tensorboardX's own, leaves a queue that nobody empties.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from pipeline.progress import console
from pipeline.shards.store import join, make_folder

FLUSH_SECONDS = 30.0


class Events:
    """A file of events for TensorBoard in `folder`, which purges those of steps from `first` on of the files before.

    A full disk ends the events and not the training, whose own files say better what to do.
    """

    def __init__(self, folder: str, first: int):
        self._writer: EventsWriter | None = None
        with self._unless_full():
            make_folder(folder)
            self._writer = EventsWriter(join(folder, "events"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with self._unless_full():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        with self._unless_full():
            if self._writer:
                self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._unless_full():
            if self._writer:
                self._writer.write_event(event)

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            console.print(f"no more events for TensorBoard: {error}")


class Progress:
    """Counts steps; a resumed run starts at `done`, with the losses of the epoch that it was stopped in. Shown by the
    one rank that has `events` to write."""

    def __init__(self, epochs: int, steps: int, done: int, losses: Sequence[float], events: Events | None):
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
        self.losses = list(losses)
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
            self.events.scalar("train/loss", loss, step)
            self.events.scalar("train/lr", lr, step)
        self.losses.append(loss)
        self.pairs += pairs
        self.taken += 1
        now = time.monotonic()
        rate = f"{self.pairs / max(now - self.epoch_begin, 1e-9):,.0f} pairs/s"
        if self.bar:
            self.bar.update(self.task, advance=1, epoch=f"{epoch}/{self.epochs}", loss=f"{loss:.3f}", rate=rate)
        if last:
            if self.events:
                self.events.flush()
            left = (now - self.begin) / self.taken * (self.left - self.taken)
            mean = sum(self.losses) / len(self.losses)
            if self.show:
                eta = f"{left // 60:.0f}:{left % 60:02.0f}"
                console.print(f"epoch {epoch}/{self.epochs}  loss {mean:.3f}  {rate}  ETA {eta}")
            self.losses, self.pairs, self.epoch_begin = [], 0, now

    def validated(self, step: int, loss: float) -> None:
        """The loss on held-out pairs after an epoch's last step."""
        if self.events:
            self.events.scalar("validation/loss", loss, step)
            console.print(f"held-out loss {loss:.3f}")

"""Where the arms of a loop are trained: in this process, or several side by side as tasks of Ray.

Trade-off: whole trainings are spread and not the steps of one. So nothing is exchanged between them, but each takes the
memory of a model, and where few arms may begin few run. A training has its share of the cores, or a GPU; the jobs over
shards before it have what Ray has left. What it prints is in its arm's folder, for bars would write over each other.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from pipeline.cluster import connected
from pipeline.errors import InputError
from pipeline.runs import Arm, Run
from pipeline.shard_map import SETTLE
from pipeline.shards.store import make_folder

LOG = "log.txt"
RETRIES = 2  # of a training whose worker died; it goes on where it last saved
ENDING = 30.0  # seconds that a training has to clear away in when it is interrupted; then it is killed
Result = TypeVar("Result")


class Lanes:
    """`count` trainings at a time; a single one runs in this process. Raises InputError where cores are too few."""

    def __init__(self, count: int):
        self.count = count
        self.share = _share(connected(log_to_driver=False).nodes(), count) if count > 1 else {}
        self._locks: dict[Any, Lock] = {}
        self._ready: set[tuple[Run, bool]] = set()  # runs that are poisoned, and those that are scored
        self._running: set[Any] = set()
        self._submitting = Lock()
        self._over = False

    def alone(self, what: Any) -> Lock:
        """The same lock for the same thing."""
        return self._locks.setdefault(what, Lock())

    def each(self, function: Callable[..., Result], units: Sequence[tuple[Any, ...]]) -> list[Result]:
        """`function(*unit)` of every unit, as many at a time as there are lanes. The first error ends all."""
        if self.count == 1:
            return [function(*unit) for unit in units]
        with ThreadPoolExecutor(self.count) as threads:
            futures = [threads.submit(function, *unit) for unit in units]
            try:
                for done in as_completed(futures):
                    done.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._end()
                raise
        return [future.result() for future in futures]

    def row(self, run: Run, arm: Arm) -> dict[str, Any]:
        """The row of an arm, made. Of one that `watches` the undefended model is there."""
        path = run.path(arm)
        with self.alone(run.folder):  # the jobs over its shards write to folders that its arms share
            begin = time.monotonic()
            if (run, bool(arm.filter)) not in self._ready:
                self._done(run.folder / LOG, {"num_cpus": 0}, run.prepare, arm)
                self._ready |= {(run, False), (run, bool(arm.filter))}
            spent = time.monotonic() - begin
        log = run.folder / arm.folder / LOG
        made: dict[str, Any] = self._done(log, self.share, run.measure, arm, path, spent, self.count)
        return made

    def _done(self, log: Path, takes: dict[str, int], function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)`, as a task that `takes` so many cores and GPUs where there are several lanes."""
        if self.count == 1:
            return function(*arguments)
        ray = connected()
        task = ray.remote(_logged).options(max_retries=RETRIES, **takes)
        with self._submitting:
            if self._over:  # while this arm waited for another
                raise InputError(f"{log}: not begun, for another arm failed")
            reference = task.remote(log, Path.cwd(), function, *arguments)
            self._running.add(reference)
        try:
            done: Result = ray.get(reference)
            return done
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        except ray.exceptions.TaskCancelledError:
            raise
        except ray.exceptions.RayError as error:  # the worker or its node died, out of memory, …
            why = f"its worker was lost {RETRIES + 1} times ({type(error).__name__})"
            raise InputError(f"{log}: {why}") from error
        finally:
            self._running.discard(reference)

    def _end(self) -> None:
        """Interrupt what runs, as Ctrl-C does: it clears away what it began to write."""
        ray = connected()
        with self._submitting:
            self._over, running = True, [*self._running]
        time.sleep(SETTLE)
        for reference in running:
            ray.cancel(reference)
        _, stuck = ray.wait(running, num_returns=len(running), timeout=ENDING) if running else ([], [])
        for reference in stuck:
            ray.cancel(reference, force=True)


def _share(nodes: Sequence[dict[str, Any]], count: int) -> dict[str, int]:
    """What one of `count` trainings takes, so that all fit: a GPU where there are any, or cores of one node."""
    of = [node["Resources"] for node in nodes if node["Alive"]]
    if gpus := int(sum(each.get("GPU", 0) for each in of)):
        if count > gpus:
            raise InputError(f"--parallel {count}: there are {gpus} GPUs, and a training takes one; ask for fewer")
        return {"num_gpus": 1, "num_cpus": 1}
    cores = [int(each.get("CPU", 0)) for each in of]
    for share in range(max(cores, default=0), 0, -1):
        if sum(core // share for core in cores) >= count:
            return {"num_cpus": share}
    raise InputError(f"--parallel {count}: there are {sum(cores)} cores; ask for fewer")


def _logged(log: Path, here: Path, function: Callable[..., Result], *arguments: Any) -> Result:
    """Of a task: what is printed goes to `log`, and paths of a config are meant from where the loop was started."""
    make_folder(str(log.parent))
    place = contextlib.chdir(here) if here.is_dir() else contextlib.nullcontext()
    with log.open("a") as file, place, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        return function(*arguments)

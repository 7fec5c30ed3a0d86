"""A function over shards on Ray: one task a shard, a bounded number in flight, resume by markers.

Trade-off: plain tasks with marker files know nothing of Ray Data's blocks, so there is no streaming between stages; in
return a shard keeps its name and its bytes, memory is bounded by the shard, and any run can be killed at any moment.
Ray itself is reached through `pipeline.cluster` alone.
"""

import dataclasses
import fcntl
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.cluster import connected
from pipeline.errors import InputError
from pipeline.progress import console, meter
from pipeline.shards import Counts, Shard, manifest
from pipeline.shards.store import (
    clear_temporaries,
    existing,
    exists,
    glob,
    is_url,
    join,
    make_folder,
    remove,
    stamp,
    view,
    write,
)
from pipeline.spec import digest

RUN = "run.json"  # what a folder is the output of, and of how many shards
RETRIES = 3  # of a task whose worker or node died; errors of our own are not retried
IN_FLIGHT_PER_CPU = 2
# Ctrl-C is often seen as a task comes home, and Ray's driver aborts where a task is cancelled while it completes (ray's
# PR 54798 tells of that race). So what is completing is given time to.
SETTLE = 0.5  # seconds
READERS = 16  # markers that are read at once
COUNTED = ("read", "out", "dropped", "failed", "changed")
_held: set[str] = set()  # folders that this process has locked


class ShardsFailed(InputError):
    """More shards than allowed could not be done. The others are; the same command does only what is missing."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """What determines the output of a run: its name and its spec (JSON-like); where it goes; what it may lose.

    `stamp` tells one state of a shard's input from another without reading it; `sha256` reads it, to be sure.
    """

    name: str
    spec: Mapping[str, Any]
    out: str
    max_failed: int = 0
    stamp: Callable[[Shard], dict[str, Any]] = lambda shard: stamp(shard.path)
    sha256: Callable[[Shard], str] = lambda shard: manifest(shard).sha256

    @property
    def digest(self) -> str:
        return digest({"job": self.name, "spec": self.spec})

    @property
    def code(self) -> str:
        """Digest of our sources, so that a marker of older code is not believed."""
        return code_digest()


@cache
def code_digest() -> str:
    root = Path(__file__).parent.parent
    sources = [root / "train" / "model.py", *(root / "filters").glob("*.py"), *(root / "pipeline").glob("*.py")]
    for room in ("shards", "attacks", "policies"):
        sources += (root / "pipeline" / room).glob("*.py")
    sha = hashlib.sha256()
    for source in sorted(sources):
        sha.update(source.name.encode() + source.read_bytes())
    return sha.hexdigest()[:16]


class _Named(Protocol):
    @property
    def path(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


def each(
    label: str, shards: Sequence[Item], function: Callable[..., Any], *shared: Any, gpu: bool = False
) -> Iterator[tuple[Item, Any]]:
    """`(shard, function(shard, *shared))` for every shard (or whatever has a path), as they finish, on a core each.

    `shared` is sent to each node once. Where the function fails, an InputError that names the shard is yielded as its
    result.
    """
    if not shards:
        return
    ray = connected(log_to_driver=False)
    with meter(label, len(shards)) as progress:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        gpus = 1 if gpu and ray.cluster_resources().get("GPU", 0) else 0
        task = ray.remote(_guarded).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        references = [ray.put(value) for value in shared]
        waiting = iter(shards)
        running: dict[Any, Item] = {}
        try:
            while True:
                while len(running) < IN_FLIGHT_PER_CPU * cpus and (shard := next(waiting, None)):
                    running[task.remote(function, shard, *references)] = shard
                if not running:
                    return
                ray.wait(list(running), num_returns=1)
                for ready in ray.wait(list(running), num_returns=len(running), timeout=0)[0]:
                    shard = running.pop(ready)
                    try:
                        result = ray.get(ready)
                    except ray.exceptions.RayError as error:  # the worker or its node died, out of memory, …
                        result = InputError(f"{shard.path}: lost {RETRIES + 1} times ({type(error).__name__})")
                    progress.advance(result["read"] if isinstance(result, dict) else getattr(result, "read", 0))
                    yield shard, result
        finally:
            if running:  # left early, by Ctrl-C: the tasks are interrupted too, and clear away what they began to write
                time.sleep(SETTLE)
                for reference in ray.wait(list(running), num_returns=len(running), timeout=0)[1]:
                    ray.cancel(reference)
                ray.wait(list(running), num_returns=len(running), timeout=30)


def succeeded(
    results: Iterator[tuple[Item, Any]], most: int = 0, failed: list[InputError] | None = None
) -> Iterator[tuple[Item, Any]]:
    """What `each` yields, less at most `most` failures; raises the one after them.

    `failed` gathers them, where several rounds share one allowance.
    """
    failed = [] if failed is None else failed
    for item, result in results:
        if not isinstance(result, InputError):
            yield item, result
            continue
        failed.append(result)
        if len(failed) > most:
            raise result


def shard_map(
    job: Job, shards: Sequence[Shard], work: Callable[..., Counts], *shared: Any, gpu: bool = False
) -> list[dict[str, Any]]:
    """Run `work(shard, out, *shared)` where no valid marker says that it was done; return all markers in order.

    A marker is valid when spec, code and input are those of this run and the output is there. When all others are done,
    raises ShardsFailed with a list of the shards that failed, if they are more than `job.max_failed`.
    """
    if job.max_failed < 0:
        raise InputError("--max-failed-shards: not below 0")
    with locked(job.out):
        clear_temporaries(job.out)
        present = _present(job, shards)
        markers = _done(job, [s for s in shards if marker_path(job.out, s) in present])
        todo = [s for s in shards if s.name not in markers]
        if stale := sum(marker_path(job.out, shard) in present for shard in todo):
            console.print(f"{job.name}: {stale} shards there are of another spec, code or input and are made again")
        if len(todo) < len(shards):
            console.print(f"{job.name}: {len(shards) - len(todo)} of {len(shards)} shards are done already")
        about = {"job": job.name, "spec": job.spec, "spec_digest": job.digest, "code": job.code, "shards": len(shards)}
        write(join(job.out, RUN), json.dumps(about, indent=1).encode())
        failures: dict[Shard, str] = {}
        task = _Marked(job, work)
        try:
            for shard, result in each(job.name, todo, task, *shared, gpu=gpu) if todo else ():
                if isinstance(result, InputError):
                    failures[shard] = str(result)
                    with suppress(InputError, OSError):  # a full disk may be why it failed
                        write(failure_path(job.out, shard), str(result).encode())
                else:
                    markers[shard.name] = result
                    result["spec"] = job.spec  # one for all: the driver holds every marker
        finally:  # of workers that were killed while others did their shards again
            clear_temporaries(job.out)
    if failures:
        message = f"{len(failures)} of {len(shards)} shards failed:\n  {_by_reason(failures)}"
        if len(failures) > job.max_failed:
            raise ShardsFailed(message)
        console.print(f"{message}\n  (the same command tries them again)")
    return [markers[s.name] for s in shards if s.name in markers]


def _by_reason(failures: Mapping[Shard, str]) -> str:
    """A line for each failure, and one for all that differ in the shard alone."""
    alike: dict[str, list[str]] = {}
    for shard, said in failures.items():
        alike.setdefault(said.removeprefix(f"{shard.path}: "), []).append(said)
    more = (f" (so do {len(said) - 1:,} more shards)" if len(said) > 1 else "" for said in alike.values())
    return "\n  ".join(said[0] + others for said, others in zip(alike.values(), more, strict=True))


def refuse_others_shards(out: str) -> None:
    """Raises InputError where a rewriter would write over, or beside, shards that no run of ours made."""
    if not exists(join(out, RUN)):
        for pattern in ("*.tar", "*.tar.gz", "*.parquet"):
            if found := glob(join(out, pattern)):
                raise InputError(f"{found[0]} was made by none of our runs; choose another folder or empty this one")


def check_made_from(folder: str, shard: Shard, sha256: str, remedy: str) -> None:
    """A poisoned shard has the uids of the clean one: a sidecar must be of these bytes, which its marker tells."""
    path = marker_path(folder, shard)
    if not exists(path):
        return  # made by another's tool
    try:
        made_from = json.loads(bytes(view(path)))["input_sha256"]
    except (ValueError, KeyError, TypeError):
        return
    if made_from != sha256:
        raise InputError(f"{folder}: made from other bytes than those of {shard.path}; {remedy}")


def _present(job: Job, shards: Sequence[Shard]) -> set[str]:
    """The markers in OUT, listed at once. Those of other shards are refused.

    The next stage would read what an earlier run over other input left as if it were of this one.
    """
    present = set(glob(join(job.out, "*.stats.json")))
    if others := sorted(present - {marker_path(job.out, shard) for shard in shards}):
        raise InputError(f"{job.out} holds shards of another input ({others[0]}); choose another folder or empty it")
    return present


def marker_path(out: str, shard: Shard) -> str:
    return join(out, f"{shard.name}.stats.json")


def failure_path(out: str, shard: Shard) -> str:
    """Why a shard failed, for `mithridate status`; gone when it is done."""
    return join(out, f"{shard.name}.failed.txt")


@contextmanager
def locked(out: str) -> Iterator[None]:
    """One run at a time writes to a local folder; the lock dies with its process. A holder may take it again."""
    if is_url(out) or out in _held:
        yield
        return
    make_folder(out)
    with (Path(out) / ".lock").open("w") as file:
        for _ in range(2):  # `status` holds it for an instant
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        else:
            raise InputError(f"{out}: another run is writing here; wait for it or choose another folder")
        _held.add(out)
        try:
            yield
        finally:
            _held.discard(out)


@dataclass(frozen=True)
class _Marked:
    """A shard's work and, last, its marker, which it returns. Runs on the worker."""

    job: Job
    work: Callable[..., Counts]

    def __call__(self, shard: Shard, *shared: Any) -> dict[str, Any]:
        begin, cpu, out = time.perf_counter(), time.process_time(), self.job.out
        source = _input(self.job, shard)  # before the work: a file that is replaced meanwhile is done again
        marker = _same_bytes(self.job, shard)
        if marker is None:
            if not getattr(self.work, "clears", False):
                clear(out, shard)
            counts = self.work(shard, out, *shared)
            if counts.read != counts.out + counts.dropped + counts.failed:
                raise AssertionError(
                    f"{shard.path}: {counts.read} samples in, but {counts.out} out, {counts.dropped} dropped, "
                    f"{counts.failed} failed"
                )
            counts.input_sha256 = counts.input_sha256 or self.job.sha256(shard)
            counts.seconds |= {"total": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
            marker = {
                "job": self.job.name,
                "spec": self.job.spec,
                "spec_digest": self.job.digest,
                "code": self.job.code,
                **dataclasses.asdict(counts),
            }
            files = [] if is_url(out) else [*filter(None, (counts.output, *counts.facts.get("files", ())))]
            marker["bytes"] = {file: stamp(join(out, file))["bytes"] for file in files}
        marker |= {"input": source, "finished": time.time()}
        write(marker_path(out, shard), json.dumps(marker, indent=1, sort_keys=True).encode())
        remove(failure_path(out, shard))
        return marker


def _guarded(function: Callable[..., Any], shard: _Named, *shared: Any) -> Any:
    try:
        return function(shard, *shared)
    except InputError as error:
        return error
    except Exception as error:  # a read error, a defect of ours: this shard failed, the others need not
        traceback.print_exc()
        return InputError(f"{shard.path}: {type(error).__name__}: {error}")


def _done(job: Job, shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """The markers, by shard, of what is of this run, as far as can be told without reading a shard."""
    found = read_markers([marker_path(job.out, shard) for shard in shards])
    markers = {s.name: m for s, m in zip(shards, found, strict=True) if _of_this_run(job, m)}
    there = existing([path for marker in markers.values() for path in _files(job.out, marker)])
    stamped = [s for s in shards if s.name in markers and markers[s.name]["input"] == _input(job, s)]
    complete = [s.name for s in stamped if there.issuperset(_files(job.out, markers[s.name]))]
    return {name: markers[name] for name in complete if _whole(job.out, markers[name])}


def read_markers(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The markers at these paths, many at once, since an object store answers slowly; {} for one that is none."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(_read_marker, paths))


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """The same entries of markers, added up: seconds, or counts by reason."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def _read_marker(path: str) -> dict[str, Any]:
    try:
        marker = json.loads(bytes(view(path)))
        needed = ("job", "code", "spec_digest", "input_sha256", "output", "finished", "bytes", *COUNTED)
        files = [marker["output"], *marker["facts"].get("files", ())]
        whole = all(name in marker for name in needed) and all(isinstance(f, str) and _within(f) for f in files)
        whole = whole and set(marker["bytes"].keys()) <= set(files)
        return marker if whole and marker["input"]["file"] else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _whole(out: str, marker: dict[str, Any]) -> bool:
    """Whether the files, which are there, have the size they had. Remote ones appear only whole."""
    return is_url(out) or all(stamp(join(out, file))["bytes"] == size for file, size in marker["bytes"].items())


def _within(file: str) -> bool:
    return not file.startswith("/") and ".." not in file.split("/")


def _of_this_run(job: Job, marker: dict[str, Any]) -> bool:
    if marker and marker["job"] != job.name:
        raise InputError(f"{job.out} holds the output of {marker['job']!r}; choose another folder for {job.name!r}")
    return bool(marker) and (marker["spec_digest"], marker["code"]) == (job.digest, job.code)


def _same_bytes(job: Job, shard: Shard) -> dict[str, Any] | None:
    """The marker of a shard that was touched or copied since, but has the same bytes."""
    if not exists(marker_path(job.out, shard)):
        return None
    marker = _read_marker(marker_path(job.out, shard))
    files = _files(job.out, marker) if _of_this_run(job, marker) else []
    there = files and existing(files).issuperset(files) and _whole(job.out, marker)
    same = there and marker["input_sha256"] == job.sha256(shard)
    return marker if same else None


def clear(out: str, shard: Shard) -> None:
    """Remove what was made of a shard by another spec: a failure must not leave it for the next stage to find.

    Work that takes something over from there says that it `clears`, and does so first of all.
    """
    if exists(path := marker_path(out, shard)):
        marker = _read_marker(path)
        remove(path)
        for file in _files(out, marker) if marker else ():
            remove(file)


def _files(out: str, marker: dict[str, Any]) -> list[str]:
    return [join(out, file) for file in (marker["output"], *marker["facts"].get("files", ())) if file]


def _input(job: Job, shard: Shard) -> dict[str, Any]:
    return {"file": shard.file, **job.stamp(shard)}

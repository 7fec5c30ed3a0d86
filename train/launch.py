"""`mithridate train`: where a training runs. The loop itself is train/trainer.py, the same everywhere.

Trade-off: one worker needs no cluster, so `--workers 1` runs the loop in this very process and saves Ray's start,
which is longer than a debug run; more workers go through Ray Train, which starts them anew when one dies. Under
`torchrun` (RANK and WORLD_SIZE are set) neither ray nor `--workers` is used. The folder for the output must be one that
every worker sees.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro

from pipeline import ledger
from pipeline.arguments import Out, Shards
from pipeline.cluster import connected
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Shard, UidRule, list_shards
from pipeline.shards.store import absolute, clear_temporaries, exists, is_url, join, make_folder, view, write
from pipeline.spec import UNDRAWN
from train.defenses import Defense
from train.recipes import recipe_of

if TYPE_CHECKING:
    from train.trainer import Task

DIGESTS = {
    "shards_digest": "of other shards",
    "recipe_digest": "by other settings of the recipe",
    "init": "from another --init",
    "validation": "with other --validation",
}
RESTARTS = 5  # of all workers after one of them died; each goes on from the last state


def train(
    shards: Shards,
    out: Out,
    /,
    *,
    recipe: str = "demo",
    defense: str | None = None,
    init: str | None = None,
    workers: int = 1,
    seed: int = 0,
    uid: UidRule = "key",
    save_minutes: float = 5.0,
    validation: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
) -> int:
    """Train CLIP on SHARDS under a frozen recipe; writes checkpoints, traces and a loss curve to OUT.

    The same command again resumes after the last state, to the same result, or returns at once when it is done.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: local folder for checkpoints/, traces/, tensorboard/, curve.parquet and train.json.
        recipe: what to train and how; `mithridate list recipes` shows them. `demo(model='RN50')` trains another of
            open_clip's models so.
        defense: as a spec; `mithridate list defenses` shows them. One that fine-tunes on trusted pairs takes their
            shards as a parameter, and SHARDS only for what of its poisons leaks into them.
        init: start from this checkpoint (folder, or open_clip:MODEL/PRETRAINED) of the recipe's own model.
        workers: processes that share each batch; 2 and more run on Ray Train, on GPUs where there are any.
        seed: of the first weights, the order and the augmentation.
        uid: how a uid is derived where samples carry none; the same as when the shards were poisoned.
        validation: held-out shards; checkpoints/best is then the epoch of the least loss on them.
        save_minutes: how much of an epoch a killed run may have to repeat; after each epoch a state is saved anyway.
    """
    task = prepare(
        shards,
        out,
        recipe=recipe,
        defense=defense,
        init=init,
        seed=seed,
        uid=uid,
        save_minutes=save_minutes,
        validation=validation,
    )
    if workers < 1:
        raise InputError(f"--workers {workers}: at least one has to work")
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    first = not under_torchrun or os.environ["RANK"] == "0"
    with locked(out) if first else nullcontext():
        if finished(task):
            if first:
                console.print(f"{out}: this training is done already; its checkpoint is {final_checkpoint(out)}")
            return 0
        if first:
            _claim(task)
        if under_torchrun:
            _under_torchrun(task)
        elif workers > 1:
            _on_ray(task, workers)
        else:
            _here(task)
        if first:
            console.print(f"checkpoint: {final_checkpoint(out)}")
    return 0


def prepare(
    shards: str,
    out: str,
    *,
    recipe: str,
    defense: str | None,
    init: str | None,
    seed: int,
    uid: UidRule,
    save_minutes: float = 5.0,
    validation: str | None = None,
) -> "Task":
    """Check the arguments, before a cluster is asked for; every byte of the shards is read once, for their digest."""
    from pipeline.spec import parse, text

    frozen = recipe_of(recipe)
    listed = list_shards(shards)
    if is_url(out):
        raise InputError(f"{out}: open_clip reads checkpoints from folders; give a local or mounted one")
    chosen = parse("defenses", defense) if defense else Defense()
    if chosen.needs_init and not init:
        raise InputError(f"--defense {defense} repairs a trained model: name it with --init")
    known = ledger.known(listed)
    listed, only = chosen.pairs(listed, known, seed)
    held_out = list_shards(validation) if validation else []
    first = None
    if init:
        from train.model import load

        first = load(init, device="cpu").digest
        init = init if ":" in init else absolute(init)
    from train.data import digest
    from train.trainer import Task

    spec = {
        "recipe": recipe,
        "recipe_digest": frozen.digest,
        "seed": seed,
        "shards_digest": digest(listed),
        "uid": uid,
        "init": first,
        "defense": text(chosen.by_content()) if defense else None,
        "validation": digest(held_out) if validation else None,
    }
    # Ray's workers start in another folder.
    return Task(
        shards=_as_workers_see(listed),
        out=absolute(out),
        recipe=recipe,
        seed=seed,
        uid=uid,
        init=init,
        defense=text(_absolute(chosen)) if defense else None,
        poisons=None if known is None else _targets(known),
        spec=spec,
        only={absolute(path): uids for path, uids in only.items()},
        save_minutes=save_minutes,
        validation=_as_workers_see(held_out),
    )


def _absolute(defense: Defense) -> Defense:
    """The defense with whole paths where its fields name places."""
    if not is_dataclass(defense):
        return defense
    hints = get_type_hints(type(defense), include_extras=True)
    places = [f.name for f in fields(defense) if UNDRAWN in getattr(hints[f.name], "__metadata__", ())]
    return replace(defense, **{name: absolute(getattr(defense, name)) for name in places})


def _as_workers_see(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    return tuple(type(shard)(absolute(shard.path)) for shard in shards)


def _targets(known: Any) -> dict[str, str]:
    """By uid, of a ledger as a pyarrow table."""
    return dict(zip(*(known.column(name).to_pylist() for name in ("uid", "target")), strict=True))


def finished(task: "Task") -> bool:
    """Whether OUT holds the result of this very task; InputError where it holds that of another."""
    file = join(task.out, "train.json") if exists(join(task.out, "train.json")) else join(task.out, "spec.json")
    if not exists(file):
        if exists(join(task.out, "state.pt")) or exists(join(task.out, "checkpoints")):
            raise InputError(f"{task.out}: holds a training without its spec.json; choose another folder")
        return False
    try:
        found: dict[str, Any] = json.loads(bytes(view(file)))
    except ValueError as error:
        raise InputError(f"{file}: not readable ({error}); remove the folder and train again") from error
    differ = [name for name, here in task.spec.items() if found.get(name) != here]
    if differ:
        told = [DIGESTS.get(name, f"{name} {found.get(name)!r} there, {task.spec[name]!r} here") for name in differ]
        raise InputError(f"{task.out}: holds another training ({'; '.join(told)}); choose another folder")
    return bool(found.get("done"))


def final_checkpoint(out: str) -> str:
    """The folder of the last weights of a finished training, for `embed` and `evaluate`."""
    return join(out, json.loads(bytes(view(join(out, "train.json"))))["checkpoint"])


def thin(out: str) -> None:
    """Leave of a finished training its last weights, without earlier ones and the state that it could go on from."""
    last = Path(final_checkpoint(out))
    for earlier in last.parent.iterdir():
        if earlier != last:
            shutil.rmtree(earlier)
    Path(out, "state.pt").unlink(missing_ok=True)


@contextmanager
def locked(out: str) -> Iterator[None]:
    """One run at a time writes to OUT; the lock dies with its process."""
    make_folder(out)
    with Path(out, ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{out}: another run is writing here; wait for it or choose another folder") from error
        yield


def _claim(task: "Task") -> None:
    """The spec that says whose the folder is, first; then the folders. What killed runs left is removed."""
    write(join(task.out, "spec.json"), json.dumps(task.spec, indent=1).encode())
    for leftover in Path(task.out, "checkpoints").glob(".*.tmp"):  # folders, which the next lines cannot clear
        shutil.rmtree(leftover)
    for folder in ("traces", "checkpoints"):
        make_folder(join(task.out, folder))
        clear_temporaries(join(task.out, folder))
    clear_temporaries(task.out)


def _here(task: "Task") -> None:
    import torch

    from train.trainer import run

    run(task, device="cuda:0" if torch.cuda.is_available() else "cpu")


def _under_torchrun(task: "Task") -> None:
    import torch
    import torch.distributed as dist

    from train.trainer import run

    local, beside = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        dist.barrier()  # until rank 0 has made the folders
        threads = max(1, (os.cpu_count() or 1) // beside)
        run(task, dist.get_rank(), dist.get_world_size(), f"cuda:{local}" if gpu else "cpu", threads)
    finally:
        dist.destroy_process_group()


def _on_ray(task: "Task", workers: int) -> None:
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--workers {workers} needs ray: install it, or start {workers} with torchrun") from error
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class _OnceIsEnough(UserCallback):
        """What a user has to mend would fail again: raised in the controller, it ends the run."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if error := _input_error(worker_exceptions):
                raise error

    if not ray.is_initialized():
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        variables = {"env_vars": {"PYTHONPATH": paths}}
        connected(logging_level=logging.WARNING, runtime_env=variables)
    has = ray.cluster_resources()
    gpu = has.get("GPU", 0) > 0
    if gpu and has["GPU"] < workers:
        raise InputError(f"--workers {workers}: the cluster has {has['GPU']:.0f} GPUs; ask for fewer workers")
    if not gpu and has.get("CPU", 0) < workers:
        raise InputError(f"--workers {workers}: the cluster has {has.get('CPU', 0):.0f} CPUs; ask for fewer workers")
    storage = tempfile.mkdtemp(prefix="mithridate-ray-")  # Ray Train's own bookkeeping; ours lies in OUT
    try:
        TorchTrainer(
            _worker,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train V1
                name="train",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=RESTARTS),  # lost nodes count apart, without a limit
                callbacks=[_OnceIsEnough()],  # type: ignore[list-item]
                logging_config=LoggingConfig(log_level="CRITICAL"),  # an error is raised below, once
            ),
        ).fit()
    except Exception as error:
        failures = getattr(error, "worker_failures", {}) or {0: getattr(error, "controller_failure", error)}
        if found := _input_error(failures):
            raise found from None
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _input_error(failures: Mapping[int, BaseException]) -> InputError | None:
    """The first that lies in one of the errors of workers, which Ray wraps in others."""
    for failure in failures.values():
        error: BaseException | None = failure
        while error is not None:
            if isinstance(error, InputError):
                return InputError(str(error))
            error = getattr(error, "cause", None) or getattr(error, "controller_failure", None) or error.__cause__
    return None


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: the process group (gloo, or nccl on GPUs) is made by TorchTrainer."""
    import ray.train
    from ray.train.torch import get_device

    from train.trainer import run

    context = ray.train.get_context()
    threads = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    run(config["task"], context.get_world_rank(), context.get_world_size(), str(get_device()), threads)


if __name__ == "__main__":
    from pipeline.cli import run as run_verb

    run_verb("train")

"""The loop: one process per worker, plain torch and torch.distributed, the same code for one worker and for many.

Trade-off: an epoch is the unit of what others read: traces, checkpoint and curve are written at its end. A run that is
killed goes on from the last state (`train/state.py`), at most `save_minutes` back, and exactly: batches and
augmentation are functions of (seed, epoch, uid). Traces say which pairs each step of the surviving run has seen.

Traces hold the loss and the similarity of a pair as the batch's forward pass found them, before the step that could
memorise it: when a sample is scored matters to a filter as much as how.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Shard, UidRule
from pipeline.shards.store import join, write
from train import accumulate, data, losses, model, state
from train.data import Batch, Index
from train.defenses import Defense
from train.progress import Events, Progress
from train.recipes import Recipe, recipe_of
from train.state import Seen
from train.towers import Encoded, Towers, average_of, encoded, optimizer_of
from train.traces import CURVE, write_curve, write_traces
from train.validation import Validation

MAX_LOGIT_SCALE = float(np.log(100))  # as open_clip clamps it (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class Task:
    """What a worker needs to know. `spec` determines the result; a folder holds one.

    A state is saved when `save_minutes` have passed since the last.
    """

    shards: tuple[Shard, ...]
    out: str
    recipe: str
    seed: int
    uid: UidRule
    init: str | None
    defense: str | None
    poisons: Mapping[str, str] | None  # uid -> target by the ledgers beside the shards; None where there are none
    spec: Mapping[str, Any]
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)  # of the shards with these paths, only these uids
    save_minutes: float = 5.0
    validation: tuple[Shard, ...] = ()  # held-out pairs


@dataclass(frozen=True)
class Features:
    """What a loss may use: unit rows of this rank's pairs, the logit scale, and the recipe's loss of each pair.

    image, text float32 [n, d]; losses float32 [n]; all carry gradients. The mean of `losses` is open_clip's loss.
    `image_view` and `text_view` [n, d] are of the second view of each pair, where the defense's `augment` made one.
    """

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: torch.Tensor
    losses: torch.Tensor
    image_view: torch.Tensor | None = None
    text_view: torch.Tensor | None = None


class Trainer:
    """One worker. A defense's `begin` and `epoch_end` may read all of it, and change `towers` and `optimizer`."""

    def __init__(self, task: Task, defense: Defense, rank: int, world: int, device: torch.device):
        self.task, self.defense = task, defense
        self.recipe: Recipe = defense.recipe(recipe_of(task.recipe))
        self.rank, self.world, self.device = rank, world, device
        tokenizer = model.tokenizer_of(self.recipe)
        self.index: Index = data.index(
            task.shards,
            self.recipe.image_size,
            tokenizer,
            task.uid,
            rank=rank,
            world=world,
            window_bytes=data.WINDOW_BYTES,
            only=task.only,
        )
        measured = task.validation and rank == 0
        self.validation = Validation(task.validation, self.recipe, task.uid, device) if measured else None
        self.towers = self._towers()
        self.ddp: nn.Module = self.towers
        self.optimizer = optimizer_of(self.towers, self.recipe)
        self.average = average_of(self.towers, self.recipe)
        self.epoch = 0  # whole ones done
        self.step = 0  # done in the epoch after them, of which `seen` tells
        self.seen = Seen()
        self.curve: dict[str, list[float]] = {name: [] for name in CURVE}
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        self.steps = len(self._edges(None)) - 1
        self._clock = (time.perf_counter(), time.process_time())
        self._saved = time.monotonic()

    def fit(self) -> dict[str, Any]:
        """Train what is left to train; returns the facts of the run."""
        self.defense.begin(self)
        self._resume()
        if self.world > 1:
            on_gpu = [self.device.index] if self.device.type == "cuda" else None
            # buffers are alike on all ranks already, batch statistics included
            options: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
            self.ddp = nn.parallel.DistributedDataParallel(self.towers, device_ids=on_gpu, **options)
        done = self.epoch * self.steps + self.step
        before = len(self.curve["step"])
        events = Events(join(self.task.out, "tensorboard"), before) if self.rank == 0 else None
        known = self.curve["loss"][before - self.step :]
        with Progress(self.recipe.epochs, self.steps, done, known, events) as progress:
            while self.epoch < self.recipe.epochs:
                self._train_epoch(progress)
                self.defense.epoch_end(self)
                self.epoch, self.step = self.epoch + 1, 0
                self._write_epoch(progress)
        return {
            "pairs": len(self.index),
            "skipped": self.index.skipped,
            "epochs": self.epoch,
            "steps": len(self.curve["step"]),
            "loss": self.curve["loss"][-1],
            "workers": self.world,
            **{k: round(v, 3) for k, v in self.spent.items()},
        }

    def _train_epoch(self, progress: Progress) -> None:
        """What is left of the epoch."""
        recipe, epoch = self.recipe, self.epoch + 1
        total = self.steps * recipe.epochs
        self.ddp.train()
        chosen = self.defense.chosen(epoch)
        steps = len(self._edges(chosen)) - 1
        batches = data.batches(
            self.index, recipe, self.task.seed, epoch, self.rank, self.world, chosen=chosen, first=self.step
        )
        for batch in batches:
            # an epoch of fewer steps passes through as much of the schedule
            lr = self.defense.rate(recipe, self.epoch * self.steps + self.step * self.steps // steps, total)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            mean, due = self._train_step(self.defense.augment(batch), batch)
            row = (len(self.curve["step"]), epoch, mean, lr, self._time_spent()["seconds"], batch.total, np.nan)
            for name, value in zip(CURVE, row, strict=True):
                self.curve[name].append(value)
            self.step += 1
            progress.advance(row[0], epoch, mean, lr, batch.total, last=self.step == steps)
            due = due and self.step < steps
            if due or self.step == steps:
                self._check_weights()
            if due:
                self._save()

    def _edges(self, chosen: np.ndarray | None) -> np.ndarray:
        """Where an epoch of the `chosen` bool[n], or of all pairs, is cut into global batches."""
        n = len(self.index) if chosen is None else int(chosen.sum())
        return data.cuts(n, self.recipe.batch, self.world)

    def _train_step(self, batch: Batch, own: Batch) -> tuple[float, bool]:
        """One step on a batch as the defense made it of its `own`: the mean loss, and whether a state is due."""
        step, n = len(self.curve["step"]), len(own.rows)
        every, backward = self._encoded(batch)
        views = (every.image[n:], every.text[n:]) if len(every.image) > n else (None, None)
        found = every._replace(image=every.image[:n], text=every.text[:n])
        pairs = losses.of_pairs(found, self.recipe.loss, self.rank, self.world)
        features = Features(found.image, found.text, found.scale, pairs, *views)
        loss = self.defense.loss(features, batch)
        mean, due = self._agreed(loss)
        if not np.isfinite(mean):
            self._check_weights(buffers=False)  # which this batch has passed through
            fine = every.image.isfinite().all(1) & every.text.isfinite().all(1)
            self._stop(f"loss is {mean} at", step, own.rows, ~fine.view(-1, n).all(0).cpu().numpy())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        backward()
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.towers.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            self.towers.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.average:
            self.average.update_parameters(self.towers.clip)
        self.seen.add(batch.rows, step, pairs, (found.image * found.text).sum(1))
        return mean, due

    def _encoded(self, batch: Batch) -> tuple[Encoded, Callable[[], None]]:
        """The features of a batch, and what is to be called after their loss's backward."""
        if self.recipe.accumulate > 1:
            return accumulate.encode_in_parts(self.encode, self.ddp, batch, self.recipe.accumulate)
        torch.manual_seed(int(batch.keys[0]) >> 1)  # patch dropout, a function of (seed, epoch, uid) as well
        return self.encode(self.ddp, batch), lambda: None

    def encode(self, towers: nn.Module, batch: Batch) -> Encoded:
        """Unit rows of all images and captions of a batch, [n, d] each, and the logit scale."""
        return encoded(towers, batch, self.recipe, self.device)

    def _agreed(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The loss over all ranks, so that all of them stop together; whether rank 0's clock says to save."""
        due = time.monotonic() - self._saved >= 60 * self.task.save_minutes
        if self.world == 1:
            return float(loss.detach()), due
        values = torch.stack([loss.detach().float(), torch.tensor(float(due and self.rank == 0), device=self.device)])
        dist.all_reduce(values)
        mean, due = values.tolist()
        return mean / self.world, due > 0

    def _check_weights(self, buffers: bool = True) -> None:
        """Before they are saved or used again: that they are numbers, or it was the last step that broke them."""
        clip = self.towers.clip
        weights = clip.state_dict().values() if buffers else clip.parameters()
        if self.seen.row and not all(w.isfinite().all() for w in weights):
            rows, step = self.seen.row[-1].numpy(), int(self.seen.step[-1][-1])
            self._stop("weights are not numbers after", step, rows, np.zeros(len(rows), bool))

    def _stop(self, what: str, step: int, rows: np.ndarray, bad: np.ndarray) -> NoReturn:
        """Name the pairs of a step, int[n] of each rank, that are `bad`, bool[n], or where none is all of them."""
        pairs = [(self.index.uid[row].decode(), bool(b)) for row, b in zip(rows, bad, strict=True)]
        every = [pair for theirs in data.gathered(pairs, self.world) for pair in theirs]
        uids = [uid for uid, b in every if b] or [uid for uid, _ in every]
        file = join(self.task.out, "nan.txt")
        if self.rank == 0:
            write(file, "\n".join([*uids, ""]).encode())
        self._barrier()  # the first that raises may end the others
        raise InputError(
            f"{file}: {what} step {step} (epoch {self.epoch + 1}); uids of that batch: "
            f"{', '.join(uids[:4])}{f' and {len(uids) - 4} more in the file' if len(uids) > 4 else ''}; "
            "look at these pairs, or train with a recipe of lower lr"
        )

    def _towers(self) -> Towers:
        recipe, task = self.recipe, self.task
        clip = model.build(recipe, task.seed)
        if task.init:
            given = model.load(task.init, device="cpu")
            start = given.model.state_dict()
            theirs, ours = ({k: tuple(v.shape) for k, v in s.items()} for s in (start, clip.state_dict()))
            if theirs != ours:
                wrong = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
                raise InputError(
                    f"{task.init}: not a checkpoint of recipe {task.recipe!r}: {wrong[0]} is {theirs.get(wrong[0])} "
                    f"there and {ours.get(wrong[0])} here; choose the recipe that it was trained with"
                )
            if other := model.unlike(given, clip, recipe):
                raise InputError(
                    f"{task.init}: fits recipe {task.recipe!r} by its shapes, but {other}; "
                    "choose a recipe that agrees, or add one to train/recipes.py"
                )
            clip.load_state_dict(start)
        accumulate.check(recipe, clip)
        if recipe.loss != "clip" and type(self.defense).loss is not Defense.loss:
            raise InputError(f"{task.defense}: changes CLIP's loss, and recipe {task.recipe!r} has {recipe.loss}'s")
        used = self.defense.vocabulary(self.index.tokens)
        if self.world > 1:
            model.synchronise(clip)
        return Towers(clip, used).to(self.device).to(memory_format=torch.channels_last)

    def _resume(self) -> None:
        trained = state.restore(self)
        if self.step and not np.array_equal(self._edges(self.defense.chosen(self.epoch + 1))[: self.step + 1], trained):
            raise InputError(
                f"{self.task.out}: was stopped within epoch {self.epoch + 1}, whose batches another number of workers "
                f"cuts elsewhere than {self.world}; go on with as many workers as before"
            )
        if self.rank == 0:  # what an interrupted epoch, perhaps with more workers, has left
            for trace in Path(self.task.out, "traces").glob("epoch_*.parquet"):
                if int(trace.name[6:9]) > self.epoch:
                    trace.unlink()
        self._barrier()
        self._clock = (time.perf_counter(), time.process_time())

    def _write_epoch(self, progress: Progress) -> None:
        """Traces of every rank, then checkpoint and curve, and last the state that says that the epoch is done."""
        out, epoch = self.task.out, self.epoch
        seen = {name: values.numpy() for name, values in self.seen.joined().items()}
        write_traces(join(out, f"traces/epoch_{epoch:03d}.rank{self.rank}.parquet"), self.index, epoch, **seen)
        self.seen = Seen()
        if self.validation:
            loss = self.curve["validation"][-1] = self.validation.loss(self._weights())
            progress.validated(len(self.curve["step"]) - 1, loss)
            if loss <= np.nanmin(self.curve["validation"]):
                self._write_checkpoint(join(out, "checkpoints/best"), epoch)
        self._save(epoch if self.recipe.keeps(epoch) else None)

    def _save(self, checkpoint: int | None = None) -> None:
        """Curve and state, which comes last, and before them the checkpoint where an epoch is given that is kept."""
        out = self.task.out
        now = self._time_spent()
        cpu = torch.tensor(now["cpu_seconds"], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(cpu)  # also the barrier behind which the traces of all ranks are written
        self.spent = {"seconds": now["seconds"], "cpu_seconds": float(cpu)}
        self._clock = (time.perf_counter(), time.process_time())
        if self.rank == 0:
            if checkpoint:
                self._write_checkpoint(checkpoint_path(out, checkpoint), checkpoint)
            write_curve(join(out, "curve.parquet"), self.curve)
        state.save(self)
        self._saved = time.monotonic()

    def _write_checkpoint(self, folder: str, epoch: int) -> None:
        model.save(folder, self._weights(), self.recipe, {**self.task.spec, "epoch": epoch})

    def _weights(self) -> dict[str, torch.Tensor]:
        """What is measured and kept: the average, or else what is trained."""
        return self.towers.state(self.average.module if self.average else None)

    def _time_spent(self) -> dict[str, float]:
        """Wall seconds so far, and this rank's share of the CPU seconds."""
        wall, cpu = self._clock
        return {
            "seconds": self.spent["seconds"] + time.perf_counter() - wall,
            "cpu_seconds": self.spent["cpu_seconds"] / self.world + time.process_time() - cpu,
        }

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def run(task: Task, rank: int = 0, world: int = 1, device: str = "cpu", threads: int | None = None) -> None:
    """Train as one of `world` workers; the process group is there already. Rank 0 writes `train.json` last.

    `threads` is this worker's share of the cores of its machine.
    """
    from pipeline.spec import parse

    if threads:
        torch.set_num_threads(threads)
    # Same command, same weights. On a GPU some kernels have no deterministic form: they warn and run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather", FutureWarning)  # open_clip's
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    defense = parse("defenses", task.defense) if task.defense else Defense()
    say = console.print if rank == 0 else lambda line: None
    trainer = Trainer(task, defense, rank, world, torch.device(device))
    index, recipe = trainer.index, trainer.recipe
    say(f"{len(index):,} pairs in {len(index.shards)} shards; skipped: {data.listed(index.skipped)}")
    if len(index) < recipe.batch:
        say(f"fewer pairs than a batch of {recipe.batch}: the batch shrinks to {len(index) - len(index) % world}")
    known = task.poisons
    poisons = None if known is None else int(np.isin(index.uid, np.array([u.encode() for u in known], "S32")).sum())
    if poisons is None:
        say("no ledger beside the shards")
    else:
        say(f"this run will see {poisons:,} known poisons ({poisons / len(index) * 1e6:,.0f} ppm)")
    facts = trainer.fit()
    if rank == 0:
        record = {
            **task.spec,
            **facts,
            "known_poisons": poisons,
            "checkpoint": checkpoint_path("", trainer.recipe.epochs).lstrip("/"),
            "done": True,
        }
        write(join(task.out, "train.json"), json.dumps(record, indent=1).encode())


def checkpoint_path(out: str, epoch: int) -> str:
    return join(out, f"checkpoints/epoch_{epoch:03d}")

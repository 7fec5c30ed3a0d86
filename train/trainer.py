"""The loop: one process per worker, plain torch and torch.distributed, the same code for one worker and for many.

Trade-off: an epoch is the unit of everything that lasts. Traces, checkpoint, curve and state are written at its end, so
a killed run repeats at most an epoch, and repeats it exactly: batches and augmentation are functions of (seed, epoch,
uid), so there is no loader state to save.

Traces hold the loss and the similarity of a pair as the batch's forward pass found them, before the step that could
memorise it: when a sample is scored matters to a filter as much as how.
"""

import io
import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Shard, UidRule
from pipeline.shards.store import exists, join, view, write
from train import data, model
from train.data import Batch, Index
from train.defenses import Defense
from train.progress import Progress
from train.recipes import Recipe, recipe_of
from train.traces import CURVE, write_curve, write_traces

MAX_LOGIT_SCALE = float(np.log(100))  # as open_clip clamps it (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class Task:
    """What a worker needs to know. `spec` determines the result; a folder holds one."""

    shards: tuple[Shard, ...]
    out: str
    recipe: str
    seed: int
    uid: UidRule
    init: str | None
    defense: str | None
    ledger: str
    spec: Mapping[str, Any]
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)  # of the shards with these paths, only these uids


@dataclass(frozen=True)
class Features:
    """What a loss may use: unit rows of this rank's pairs, the logit scale, and open_clip's loss of each pair.

    image, text float32 [n, d]; losses float32 [n]; all carry gradients. The mean of `losses` is ClipLoss. `image_view`
    and `text_view` [n, d] are of the second view of each pair, where the defense's `augment` made one.
    """

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: torch.Tensor
    losses: torch.Tensor
    image_view: torch.Tensor | None = None
    text_view: torch.Tensor | None = None


class Towers(nn.Module):
    """Both encoders in one forward pass, which is what DistributedDataParallel wraps.

    `used` are the token ids in use: only their rows of the embedding are trained, renumbered 0..len(used). A dense
    AdamW step over all 49,408 rows would cost more than the rest of a small model, for rows that get no gradient. They
    keep their values at the start, where a dense optimiser would only have decayed them.
    """

    def __init__(self, clip: Any, used: np.ndarray | None):
        super().__init__()
        self.clip: Any = clip
        self.whole: torch.Tensor | None = None
        self.used: torch.Tensor | None
        self.row_of: torch.Tensor | None
        self.register_buffer("used", None, persistent=False)
        self.register_buffer("row_of", None, persistent=False)
        if used is not None:
            self.whole = clip.token_embedding.weight.detach().clone()
            self.used = torch.from_numpy(used.astype(np.int64))
            self.row_of = torch.full((len(self.whole),), -1, dtype=torch.int64)
            self.row_of[self.used] = torch.arange(len(used))
            clip.token_embedding = nn.Embedding.from_pretrained(self.whole[self.used], freeze=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = tokens if self.row_of is None else self.row_of[tokens]  # in order: the end of text stays the largest
        image, text = self.clip.encode_image(images), self.clip.encode_text(tokens)
        unit = torch.nn.functional.normalize
        return unit(image.float(), dim=-1), unit(text.float(), dim=-1), self.clip.logit_scale.exp()

    def state(self) -> dict[str, torch.Tensor]:
        """The state dict of the whole open_clip model."""
        state = dict(self.clip.state_dict())
        if self.whole is not None and self.used is not None:
            full = self.whole.clone()
            full[self.used.cpu()] = state["token_embedding.weight"].cpu()
            state["token_embedding.weight"] = full
        return state


class Trainer:
    """One worker. A defense's `begin` and `epoch_end` may read all of it, and change `towers` and `optimizer`."""

    def __init__(self, task: Task, defense: Defense, rank: int, world: int, device: torch.device):
        self.task, self.defense = task, defense
        self.recipe: Recipe = defense.recipe(recipe_of(task.recipe))
        self.rank, self.world, self.device = rank, world, device
        tokenizer = model.tokenizer_of(self.recipe)
        self.index: Index = data.index(
            task.shards, self.recipe.image_size, tokenizer, task.uid, rank=rank, world=world, only=task.only
        )
        self.towers = self._towers()
        self.ddp: nn.Module = self.towers
        self.optimizer = _optimizer(self.towers, self.recipe)
        self.epoch = 0  # whole ones done
        self.curve: dict[str, list[float]] = {name: [] for name in CURVE}
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        self.steps = len(data.cuts(len(self.index), self.recipe.batch, world)) - 1
        self._clock = (time.perf_counter(), time.process_time())

    def fit(self) -> dict[str, Any]:
        """Train what is left to train; returns the facts of the run."""
        self.defense.begin(self)
        self._resume()
        if self.world > 1:
            on_gpu = [self.device.index] if self.device.type == "cuda" else None
            self.ddp = nn.parallel.DistributedDataParallel(self.towers, device_ids=on_gpu, gradient_as_bucket_view=True)
        with Progress(self.recipe.epochs, self.steps, self.epoch, show=self.rank == 0) as progress:
            while self.epoch < self.recipe.epochs:
                traces = self._train_epoch(progress)
                self.defense.epoch_end(self)
                self.epoch += 1
                self._write_epoch(traces)
        return {
            "pairs": len(self.index),
            "skipped": self.index.skipped,
            "epochs": self.epoch,
            "steps": len(self.curve["step"]),
            "loss": self.curve["loss"][-1],
            "workers": self.world,
            **{k: round(v, 3) for k, v in self.spent.items()},
        }

    def _train_epoch(self, progress: Progress) -> dict[str, np.ndarray]:
        import open_clip

        rank, world, recipe = self.rank, self.world, self.recipe
        contrastive = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        total = self.steps * recipe.epochs
        rows, losses, similarities = [], [], []
        self.ddp.train()
        epoch = self.epoch + 1
        chosen = self.defense.chosen(epoch)
        steps = self.steps if chosen is None else len(data.cuts(int(chosen.sum()), recipe.batch, world)) - 1
        batches = data.batches(self.index, recipe, self.task.seed, epoch, rank, world, chosen=chosen)
        for i, batch in enumerate(batches):
            step = len(self.curve["step"])
            # an epoch of fewer steps passes through as much of the schedule
            lr = self.defense.rate(recipe, self.epoch * self.steps + i * self.steps // steps, total)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            batch = self.defense.augment(batch)
            image, text, scale = self.encode(self.ddp, batch)
            n = len(batch.rows)
            views = (image[n:], text[n:]) if len(image) > n else (None, None)
            image, text = image[:n], text[:n]
            of_image, of_text = contrastive.get_logits(image, text, scale)
            truth = contrastive.get_ground_truth(self.device, len(image))
            entropy = torch.nn.functional.cross_entropy
            pairs = (entropy(of_image, truth, reduction="none") + entropy(of_text, truth, reduction="none")) / 2
            loss = self.defense.loss(Features(image, text, scale, pairs, *views), batch, self.towers.clip)
            mean = self._mean(loss)
            if not np.isfinite(mean):
                self._stop(batch, mean, step, image, text)
            rows.append(batch.rows)
            losses.append(pairs.detach())
            similarities.append((image * text).sum(1).detach())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.grad_clip:
                nn.utils.clip_grad_norm_(self.towers.parameters(), recipe.grad_clip)
            self.optimizer.step()
            with torch.no_grad():
                self.towers.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            seconds = self._time_spent()["seconds"]
            for name, value in zip(CURVE, (step, epoch, mean, lr, seconds, batch.total), strict=True):
                self.curve[name].append(value)
            progress.advance(epoch, mean, batch.total, last=i == steps - 1)
        return {
            "row": np.concatenate(rows),
            "loss": torch.cat(losses).float().cpu().numpy(),
            "similarity": torch.cat(similarities).float().cpu().numpy(),
        }

    def encode(self, towers: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit rows of all images and captions of a batch, [n, d] each, and the logit scale."""
        images = batch.images.permute(0, 2, 3, 1).to(self.device)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")
        with _kernels(self.device), half:
            normal = model.normalise(images, self.recipe.mean, self.recipe.std)
            return towers(normal, batch.tokens.to(self.device))

    def _mean(self, loss: torch.Tensor) -> float:
        """The loss over all ranks, so that all of them stop together."""
        if self.world == 1:
            return float(loss.detach())
        value = loss.detach().clone()
        dist.all_reduce(value)
        return float(value) / self.world

    def _stop(self, batch: Batch, loss: float, step: int, image: torch.Tensor, text: torch.Tensor) -> None:
        """The loss is not a number: name the pairs whose features are not, or else all of the batch."""
        bad = ~(image.isfinite().all(1) & text.isfinite().all(1)).cpu().numpy()
        uids = [self.index.uid[row].decode() for row in (batch.rows[bad] if bad.any() else batch.rows)]
        file = join(self.task.out, f"nan.rank{self.rank}.txt")
        write(file, "\n".join([*uids, ""]).encode())
        raise InputError(
            f"{file}: loss is {loss} at step {step} (epoch {self.epoch + 1}); uids of that batch: "
            f"{', '.join(uids[:4])}{f' and {len(uids) - 4} more in the file' if len(uids) > 4 else ''}; "
            "look at these pairs, or train with a recipe of lower lr"
        )

    def _towers(self) -> Towers:
        recipe, task = self.recipe, self.task
        clip = model.build(recipe, task.seed)
        if task.init:
            state = model.load(task.init, device="cpu").model.state_dict()
            theirs, ours = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, clip.state_dict()))
            if theirs != ours:
                wrong = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
                raise InputError(
                    f"{task.init}: not a checkpoint of recipe {task.recipe!r}: {wrong[0]} is {theirs.get(wrong[0])} "
                    f"there and {ours.get(wrong[0])} here; choose the recipe that it was trained with"
                )
            clip.load_state_dict(state)
        used = self.defense.vocabulary(self.index.tokens)
        if self.world > 1:
            model.synchronise(clip)
        return Towers(clip, used).to(self.device).to(memory_format=torch.channels_last)

    def _resume(self) -> None:
        file = join(self.task.out, "state.pt")
        if exists(file):
            try:
                state = torch.load(io.BytesIO(view(file)), map_location="cpu", weights_only=True)
                self.towers.clip.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.epoch, self.curve, self.spent = state["epoch"], state["curve"], state["spent"]
                self.defense.memory.update({k: v.to(self.device) for k, v in state["memory"].items()})
            except Exception as error:  # unpickling meets foreign bytes here; whatever it raises, the file is bad
                raise InputError(
                    f"{file}: cannot resume from it ({type(error).__name__}); remove the folder and start again"
                ) from error
        if self.rank == 0:  # what an interrupted epoch, perhaps with more workers, has left
            for trace in Path(self.task.out, "traces").glob("epoch_*.parquet"):
                if int(trace.name[6:9]) > self.epoch:
                    trace.unlink()
        self._barrier()
        self._clock = (time.perf_counter(), time.process_time())

    def _write_epoch(self, traces: dict[str, np.ndarray]) -> None:
        """Traces of every rank, then checkpoint and curve, and last the state that says that the epoch is done."""
        out, epoch = self.task.out, self.epoch
        if not all(p.isfinite().all() for p in self.towers.parameters()):
            raise InputError(f"{out}: the last step of epoch {epoch} left weights that are not numbers; lower the lr")
        write_traces(join(out, f"traces/epoch_{epoch:03d}.rank{self.rank}.parquet"), self.index, epoch, **traces)
        now = self._time_spent()
        cpu = torch.tensor(now["cpu_seconds"], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(cpu)  # also the barrier behind which all traces are written
        self.spent = {"seconds": now["seconds"], "cpu_seconds": float(cpu)}
        self._clock = (time.perf_counter(), time.process_time())
        if self.rank == 0:
            if self.recipe.keeps(epoch):
                origin = {**self.task.spec, "epoch": epoch}
                model.save(checkpoint_path(out, epoch), self.towers.state(), self.recipe, origin)
            write_curve(join(out, "curve.parquet"), self.curve)
            state = {
                "model": self.towers.clip.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": epoch,
                "curve": self.curve,
                "spent": self.spent,
                "memory": {k: v for k, v in self.defense.memory.items() if isinstance(v, torch.Tensor)},
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write(join(out, "state.pt"), bytes(buffer.getbuffer()))
        self._barrier()

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
    poisons = known_poisons(task.ledger, index)
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


def known_poisons(ledger: str, index: Index) -> int | None:
    """How many pairs of the index the ledger names; None where there is no ledger."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not exists(ledger):
        return None
    try:
        uids = pq.read_table(pa.BufferReader(pa.py_buffer(view(ledger))), columns=["uid"]).column("uid").to_pylist()
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{ledger}: not a ledger ({error}); poison the shards again or remove it") from error
    return int(np.isin(index.uid, np.array([str(u).encode() for u in uids], "S32")).sum())


def _kernels(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the flash kernel's backward took 31% of the demo's step (16 tokens); two plain products take 5%."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def checkpoint_path(out: str, epoch: int) -> str:
    return join(out, f"checkpoints/epoch_{epoch:03d}")


def _optimizer(towers: Towers, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW without decay of gains, biases, norms and the logit scale: open_clip's groups (open_clip_train/main.py)."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in towers.named_parameters():
        plain = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        (rest if plain else decay).append(parameter)
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": recipe.weight_decay}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

"""OUT/state.pt: all that a run needs to go on after the step at which it was written, with the same samples to the
same weights.

Trade-off: one file, written by rank 0, so it costs two more copies of the weights every time; what each rank has seen
of the epoch is in it too, so that traces need no files of their own before an epoch is whole. There is neither a
loader's nor a random generator's state: batches and augmentation are functions of (seed, epoch, uid).
"""

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.shards.store import exists, join, whole

if TYPE_CHECKING:
    from train.trainer import Trainer

FILE = "state.pt"


@dataclass
class Seen:
    """What a rank has seen of an epoch, a list item a step: rows of the index, the step, losses and similarities."""

    row: list[torch.Tensor] = field(default_factory=list)
    step: list[torch.Tensor] = field(default_factory=list)
    loss: list[torch.Tensor] = field(default_factory=list)
    similarity: list[torch.Tensor] = field(default_factory=list)

    def add(self, rows: np.ndarray, step: int, loss: torch.Tensor, similarity: torch.Tensor) -> None:
        self.row.append(torch.from_numpy(rows))
        self.step.append(torch.full((len(rows),), step, dtype=torch.int32))
        self.loss.append(loss.detach().float())
        self.similarity.append(similarity.detach().float())

    def joined(self) -> dict[str, torch.Tensor]:
        """Each of them in one piece, on the CPU."""
        return {name: torch.cat(parts).cpu() for name, parts in vars(self).items() if parts}


def save(trainer: "Trainer") -> None:
    """Called on every rank; returns when the file is there."""
    seen = [trainer.seen.joined()]
    if trainer.world > 1:
        every: list[Any] = [None] * trainer.world
        dist.gather_object(seen[0], every if trainer.rank == 0 else None)
        seen = every
    if trainer.rank == 0:
        state = {
            "model": trainer.towers.clip.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "average": trainer.average.state_dict() if trainer.average else None,
            "epoch": trainer.epoch,
            "step": trainer.step,
            "seen": seen,
            "curve": trainer.curve,
            "spent": trainer.spent,
            "memory": {k: v for k, v in trainer.defense.memory.items() if isinstance(v, torch.Tensor)},
        }
        buffer = io.BytesIO()  # torch turns the errors of a file into others, which do not say that the disk is full
        torch.save(state, buffer)
        with whole(join(trainer.task.out, FILE)) as file:
            file.write(buffer.getbuffer())
    if trainer.world > 1:
        dist.barrier()


def restore(trainer: "Trainer") -> np.ndarray:
    """Bring a trainer that has just begun to where the file was written; nothing where there is none.

    Returns the edges of the global batches that have been trained on in its epoch, int64[step + 1].
    """
    file = join(trainer.task.out, FILE)
    if not exists(file):
        return np.zeros(1, np.int64)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        trainer.towers.clip.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        if trainer.average:
            trainer.average.load_state_dict(state["average"])
        trainer.epoch, trainer.step = state["epoch"], state["step"]
        trainer.curve, trainer.spent = state["curve"], state["spent"]
        steps = [part["step"].numpy() for part in state["seen"] if part]
        # each its own, and all of them if the world is smaller
        for part in state["seen"][trainer.rank :: trainer.world]:
            for name, values in part.items():
                getattr(trainer.seen, name).append(
                    values.to(trainer.device) if name in ("loss", "similarity") else values
                )
        trainer.defense.memory.update({k: v.to(trainer.device) for k, v in state["memory"].items()})
    except (OSError, MemoryError, torch.OutOfMemoryError):  # which say nothing of the file
        raise
    except Exception as error:  # unpickling meets foreign bytes here; whatever it raises, the file is bad
        raise InputError(
            f"{file}: cannot resume from it ({type(error).__name__}); remove the folder and start again"
        ) from error
    sizes = np.unique(np.concatenate(steps), return_counts=True)[1] if steps else np.zeros(0, np.int64)
    return np.cumsum([0, *sizes])

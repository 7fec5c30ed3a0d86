"""Every pair of the index as the model sees it now: not augmented, in evaluation mode, shared among the ranks."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from train import data
from train.defenses._contrastive import summed

if TYPE_CHECKING:
    from train.trainer import Trainer


def encoded(
    trainer: "Trainer", chosen: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Rows of the index int64[m], and unit image and text features [m, d] of this rank's share; a batch at a time.

    `chosen` bool[n]: of these rows only. Where ranks do not divide the rows, up to world - 1 of them do not come.
    """
    plain = dataclasses.replace(trainer.recipe, pad=0, zoom=0.0, gain=0.0, flip=False)
    seed, epoch = trainer.task.seed, trainer.epoch + 1
    trainer.towers.eval()
    with torch.no_grad():
        for batch in data.batches(trainer.index, plain, seed, epoch, trainer.rank, trainer.world, chosen=chosen):
            image, text, *_ = trainer.encode(trainer.towers, batch)
            yield batch.rows, image, text
    trainer.towers.train()


def similarities(trainer: "Trainer") -> torch.Tensor:
    """float32 [n]: the cosine of each pair, on every rank. Rows that did not come have NaN."""
    values = torch.zeros(2, len(trainer.index), device=trainer.device)
    for rows, image, text in encoded(trainer):
        values[:, rows] = torch.stack([(image * text).sum(1), torch.ones(len(rows), device=trainer.device)])
    total, seen = summed(values)
    return torch.where(seen > 0, total, torch.nan)

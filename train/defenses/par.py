"""PAR, perturb and recover: push the features away from those of the poisoned model, and let CLIP's loss hold the rest.

Trade-off: needs no augmentation that destroys the trigger, so it also reaches triggers that survive AutoAugment; moving
away from what was learnt is also moving away from what was right, and trusted pairs have to bring that back.

Source: PAR (Singh et al. 2024, arXiv 2412.00727): loss, threshold 2.15 on the batch's mean squared distance, 10 epochs
with a cosine from 3e-5 (after a pretraining at 5e-4), weight decay 1e-4, batches of 256. Light noise and cutout are
named there without strengths that could be read here; ours are a standard deviation of 0.02 and a quarter of the side.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.defenses._contrastive import summed, world
from train.defenses._trusted import Trusted

if TYPE_CHECKING:
    from train.data import Batch
    from train.recipes import Recipe
    from train.trainer import Features, Trainer


@dataclass(frozen=True)
class par(Trusted):
    """Away from the poisoned features while CLIP's loss holds (PAR, 2024)."""

    lr: float = 0.06
    batch: int = 256
    threshold: float = 2.15
    weight_decay: float = 1e-4

    def recipe(self, recipe: "Recipe") -> "Recipe":
        return dataclasses.replace(super().recipe(recipe), weight_decay=self.weight_decay)

    def begin(self, trainer: "Trainer") -> None:
        frozen = copy.deepcopy(trainer.towers).eval().requires_grad_(False)
        self.memory["poisoned"] = lambda batch: trainer.encode(frozen, batch)

    def augment(self, batch: "Batch") -> "Batch":
        from train.augmentation import noise_and_cutout

        return dataclasses.replace(batch, images=noise_and_cutout(batch.images, batch.keys))

    def vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        return np.unique(tokens)  # captions stay as they are

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        with torch.no_grad():
            image, text, *_ = self.memory["poisoned"](batch)
        moved = [(a - b).square().sum(1).mean() for a, b in ((features.image, image), (features.text, text))]
        near = [bool(summed(m.detach()) / world() <= self.threshold) for m in moved]
        return features.losses.mean() - sum(m * n for m, n in zip(moved, near, strict=True)) / 2

"""RoCLIP: every few epochs an image learns the nearest caption of a random pool instead of its own.

Trade-off: breaks the tie between a poisoned image and its caption without knowing which pairs are poisoned, but what it
puts in the place of a clean caption is only as good as the pool: 2% of a million captions hold a paraphrase of most, 2%
of ten thousand do not. In these epochs the text tower learns nothing (so in the released code, too).

Source: RoCLIP (Yang et al., NeurIPS 2023, section 4). Kept: the pool's share, K = 3, jitter, grey, blur and flip, a
FIFO of caption features. Changed: crops have a side of 7/8 to 1, drawn, where theirs is 224 of 256 pixels; the pool
takes up captions in every epoch, not only in every third, so that what it holds is never features of three epochs ago;
rate, batch and length are the recipe's.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.defenses import Defense
from train.defenses._contrastive import contrastive, nearest, push

if TYPE_CHECKING:
    from train.data import Batch
    from train.recipes import Recipe
    from train.trainer import Features, Trainer


@dataclass(frozen=True)
class roclip(Defense):
    """Match images with the nearest caption of a random pool, every K epochs (RoCLIP, 2023)."""

    every: int = 3
    pool: float = 0.02

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.pool <= 1:
            raise ValueError("every is 1 or more, pool a share above 0")

    def recipe(self, recipe: "Recipe") -> "Recipe":
        return dataclasses.replace(recipe, pad=0, zoom=1 / 8, flip=True, gain=0.0)

    def vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        from train.eda import vocabulary

        return vocabulary(tokens)

    def begin(self, trainer: "Trainer") -> None:
        self.memory["size"] = max(2, round(self.pool * len(trainer.index)))
        self.memory["pool"] = torch.empty(0, trainer.recipe.model["embed_dim"], device=trainer.device)

    def augment(self, batch: "Batch") -> "Batch":
        from train.augmentation import jitter_grey_blur
        from train.eda import eda

        images, tokens = jitter_grey_blur(batch.images, batch.keys), eda(batch.tokens, batch.keys)
        return dataclasses.replace(batch, images=images, tokens=tokens)

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        pool = self.memory["pool"]
        self.memory["pool"] = push(pool, features.text, self.memory["size"])
        if batch.epoch % self.every or not len(pool):
            return features.losses.mean()
        matched = contrastive(features.image, nearest(features.image, pool), features.logit_scale)
        return matched + 0 * features.text.sum()  # every parameter has a gradient, as several workers need it

"""Which epoch was best: the loss on held-out pairs after each.

Trade-off: rank 0 measures alone while the others wait, and the whole model is put together for it, unused words
included, since held-out captions may have words that training never met. That costs one pass forward over the held-out
pairs an epoch; who minds it holds out fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.shards import Shard, UidRule
from train import data, losses, model
from train.recipes import Recipe
from train.towers import Towers, encoded


class Validation:
    """The pairs of `shards`, not augmented, always in the same batches of the recipe's size."""

    def __init__(self, shards: Sequence[Shard], recipe: Recipe, uid: UidRule, device: torch.device):
        self.recipe = replace(recipe, pad=0, zoom=0.0, gain=0.0, flip=False, precision="fp32")
        self.device = device
        self.index = data.index(shards, recipe.image_size, model.tokenizer_of(recipe), uid)

    def loss(self, state: Mapping[str, torch.Tensor]) -> float:
        """The mean of the recipe's loss over all pairs, under the weights of a whole open_clip model."""
        clip = model.build(self.recipe, 0)
        clip.load_state_dict(dict(state))
        towers = Towers(clip, None).to(self.device).eval()
        found = []
        with torch.inference_mode():
            for batch in data.batches(self.index, self.recipe, 0, 1):
                features = encoded(towers, batch, self.recipe, self.device)
                found.append(losses.of_pairs(features, self.recipe.loss, 0, 1).cpu().numpy())
        return float(np.concatenate(found).mean())

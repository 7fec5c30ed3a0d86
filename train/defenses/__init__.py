"""Defenses: one file, one training-time or post-hoc defense. Each overrides some hooks of the trainer.

A defense is a frozen dataclass named as its file that derives from `Defense`; what it does not override is plain CLIP.
Its fields are its parameters. What a run has to remember is in `memory`, not in fields.

Published rates and lengths are those of models a thousand times larger. They are kept as ratios: a rate as a share of
the rate that the model was trained at, a phase as a share of the training, a pool as a share of the data.
Batches, banks and the epochs of a repair are the papers' own numbers.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.shards import Shard
    from train.data import Batch
    from train.recipes import Recipe
    from train.trainer import Features, Trainer


class Defense:
    """The places where a defense may act; each leaves things as they are here."""

    needs_init = False  # whether it repairs a trained model, which is then given by --init

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What a run remembers, alike on all ranks at every step.

        Tensors are saved and are there after a resume; what else there is `begin` must make again.
        """
        return {}

    def by_content(self) -> "Defense":
        """With digests for paths: the same defense where a file was moved, another one where it was changed."""
        return self

    def pairs(self, shards: "Sequence[Shard]", known: Any, seed: int) -> "tuple[list[Shard], Mapping[str, frozenset]]":
        """The shards that it trains on instead, and for some of their paths the only uids that are used of them.

        `known` is the ledger of `shards` as a pyarrow table, None where they have none.
        """
        return list(shards), {}

    def recipe(self, recipe: "Recipe") -> "Recipe":
        """The recipe with what the defense's own paper prescribes, such as the length of a fine-tuning."""
        return recipe

    def rate(self, recipe: "Recipe", step: int, total: int) -> float:
        """The learning rate of a step (0-based) of `total`."""
        return recipe.rate(step, total)

    def vocabulary(self, tokens: np.ndarray) -> np.ndarray | None:
        """Token ids, sorted, that captions may have after `augment`; None for all. tokens int32 [n, context]."""
        # a defense that rewrites captions may use words that no caption has
        return np.unique(tokens) if type(self).augment is Defense.augment else None

    def begin(self, trainer: "Trainer") -> None:
        """Called on every rank before the first step, and before a resume brings weights and memory back."""

    def chosen(self, epoch: int) -> np.ndarray | None:
        """bool[n]: the pairs of the index that an epoch (1-based) passes through; None for all.

        It must not change within the epoch, since a run that is resumed there asks again.
        """
        return None

    def augment(self, batch: "Batch") -> "Batch":
        """The batch that the model sees instead. images uint8 [n, 3, s, s], tokens int64 [n, context]."""
        return batch

    def loss(self, features: "Features", batch: "Batch") -> "Tensor":
        """The scalar that is minimised: open_clip's contrastive loss averaged over the pairs of this rank."""
        return features.losses.mean()

    def epoch_end(self, trainer: "Trainer") -> None:
        """Called on every rank after an epoch's last step, before its checkpoint is written."""

"""Defenses: one file, one training-time or post-hoc defense. Each overrides one hook of the trainer.

A defense is a frozen dataclass named as its file that derives from `Defense`; what it does not override is plain CLIP.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from train.data import Batch
    from train.trainer import Features, Trainer


class Defense:
    """The three places where a defense may act; each is the identity here."""

    def augment(self, batch: "Batch") -> "Batch":
        """The batch that the model sees instead. images uint8 [n, 3, s, s], tokens int64 [n, context]."""
        return batch

    def loss(self, features: "Features", batch: "Batch", model: Any) -> "Tensor":
        """The scalar that is minimised: open_clip's contrastive loss averaged over the pairs of this rank."""
        return features.losses.mean()

    def epoch_end(self, trainer: "Trainer") -> None:
        """Called on every rank after an epoch's last step, before its checkpoint is written."""

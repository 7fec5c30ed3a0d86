"""ABL, anti-backdoor learning: what is learnt first is isolated, and then unlearnt by gradient ascent.

Trade-off: rests on poison having the least loss early. That holds for a trigger in a tenth of CIFAR-10. Under a
contrastive loss m pairs of one caption in a batch are each other's negatives, so that the loss of each is at least
ln m however well they are learnt: above gamma for two. Poisons that share captions are then isolated last, and what is
unlearnt is the easiest of the clean pairs, as in our runs.

Source: ABL (Li et al., NeurIPS 2021, section 4; settings of the released code): local gradient ascent at gamma 0.5,
the 1% of lowest loss, then 10, 60 and 5 epochs, stretched to the recipe's.
Changed for a contrastive loss: gamma is that of ten classes; a pair's loss is what its batch found in the last tuning
epoch; isolated pairs unlearn in batches of everything, since among other poisons of the same caption they have no
negatives, so that this phase has its share of the steps as well (theirs: 40, five passes over 500 images by 64).
Changed for Adam, whose step is as long as the rate whatever the gradient: unlearning begins with a fresh state, since
the old one still descends, and not at 0.005 of the training's rate, which is one for SGD, but at a fiftieth, as repairs
of a CLIP do (CleanCLIP's 1e-5 after 5e-4).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.errors import InputError
from train.defenses import Defense
from train.defenses._contrastive import average, gathered

if TYPE_CHECKING:
    from train.data import Batch
    from train.recipes import Recipe
    from train.trainer import Features, Trainer


@dataclass(frozen=True)
class abl(Defense):
    """Isolate the pairs that are learnt first, train on the rest, unlearn the isolated (ABL, 2021)."""

    gamma: float = 0.5
    isolate: float = 0.01
    tuning: int = 10
    finetuning: int = 60
    unlearning: int = 5
    slow: float = 0.02

    def __post_init__(self) -> None:
        if min(self.tuning, self.finetuning, self.unlearning) < 1 or not 0 < self.isolate < 0.25:
            raise ValueError("every phase has an epoch, and isolate is a share below 0.25")

    def phases(self, epochs: int) -> tuple[int, int]:
        """The last epochs of tuning and of finetuning, 1-based."""
        whole = self.tuning + self.finetuning + self.unlearning
        return max(1, round(self.tuning / whole * epochs)), epochs - max(1, round(self.unlearning / whole * epochs))

    def recipe(self, recipe: "Recipe") -> "Recipe":
        if recipe.epochs < 3:
            raise InputError(f"abl has three phases and the recipe {recipe.epochs} epochs; take a longer recipe")
        return recipe

    def rate(self, recipe: "Recipe", step: int, total: int) -> float:
        unlearning = step * recipe.epochs // total >= self.phases(recipe.epochs)[1]
        return recipe.lr * self.slow if unlearning else recipe.rate(step, total)

    def begin(self, trainer: "Trainer") -> None:
        n = len(trainer.index)
        self.memory["ends"] = self.phases(trainer.recipe.epochs)
        self.memory["losses"] = torch.full((n,), torch.nan, device=trainer.device)  # of what no rank has met
        self.memory["isolated"] = torch.zeros(n, dtype=torch.bool, device=trainer.device)

    def chosen(self, epoch: int) -> np.ndarray | None:
        tuned, finetuned = self.memory["ends"]
        return ~self.memory["isolated"].cpu().numpy() if tuned < epoch <= finetuned else None

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        tuned, finetuned = self.memory["ends"]
        losses, rows = features.losses, torch.from_numpy(batch.rows).to(features.losses.device)
        if batch.epoch <= tuned:
            if batch.epoch == tuned:
                self.memory["losses"][gathered(rows)] = gathered(losses.detach().float())
            return (torch.sign(losses - self.gamma).detach() * losses).mean()
        return losses.mean() if batch.epoch <= finetuned else -average(losses, self.memory["isolated"][rows])

    def epoch_end(self, trainer: "Trainer") -> None:
        tuned, finetuned = self.memory["ends"]
        if trainer.epoch + 1 == tuned:
            losses = self.memory["losses"].cpu().numpy()
            n = max(1, round(self.isolate * len(losses)))
            self.memory["isolated"][np.argsort(losses, kind="stable")[:n].copy()] = True  # NaN comes last
        if trainer.epoch + 1 == finetuned:
            trainer.optimizer.state.clear()

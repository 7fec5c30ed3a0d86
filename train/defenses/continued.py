"""Training goes on from --init on new data, for a few epochs at a rate of its own: an update of a deployed model.

Trade-off: a high rate forgets a one-shot poison within an update or two, and with it what the new data do not repeat; a
low one keeps both. Nothing is filtered: an attacker who injects again is learnt again.

Source: Backdoor survivability under updates (arXiv 2206.04677; abstract only), which finds that the rate's schedule
decides. Epochs and rate are ours: a quarter of a demo training at a tenth of its rate.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from train.defenses import Defense

if TYPE_CHECKING:
    from train.recipes import Recipe


@dataclass(frozen=True)
class continued(Defense):
    """A few more epochs on SHARDS, at a constant or a falling share of the recipe's rate (survivability, 2022)."""

    epochs: int = 3
    lr: float = 0.1
    schedule: Literal["constant", "cosine"] = "constant"

    needs_init = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lr <= 0:
            raise ValueError("epochs is 1 or more, lr above 0")

    def recipe(self, recipe: "Recipe") -> "Recipe":
        return dataclasses.replace(recipe, epochs=self.epochs, lr=recipe.lr * self.lr, warmup=0.0, checkpoints=())

    def rate(self, recipe: "Recipe", step: int, total: int) -> float:
        return recipe.lr if self.schedule == "constant" else recipe.rate(step, total)

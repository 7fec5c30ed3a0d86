"""Super-fine-tuning: cycles of a large rate throw weights out of the poisoned basin, cycles of a small one settle them.

Trade-off: a large rate forgets the backdoor and whatever else the trusted pairs do not teach again.

Source: Sha et al. 2022 (arXiv 2212.09067), two phases of linear cycles after super-convergence (Smith & Topin 2017).
Only its abstract and reviews could be read here. The peaks, 0.1 and 0.001 over a base of 0.0003 where a training has
0.1, are from memory and not verified; so is that each phase takes half of the steps. They are shares of the recipe's
rate. Epochs and batch are those of `finetune`, so that the two differ by the schedule alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.defenses._trusted import Trusted

if TYPE_CHECKING:
    from train.recipes import Recipe


@dataclass(frozen=True)
class super_finetune(Trusted):
    """CLIP on trusted pairs under a cyclic rate, first large, then small (Super-FT, 2022)."""

    lr: float = 0.003
    high: float = 1.0
    low: float = 0.01
    cycles: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1 or not self.lr <= self.low <= self.high:
            raise ValueError("cycles is 1 or more, and lr <= low <= high")

    def rate(self, recipe: "Recipe", step: int, total: int) -> float:
        """Triangles between the base and `high` in the first half of the steps, and `low` in the second."""
        phase, within = divmod(2 * (step + 0.5) / total, 1)
        peak = (self.high if phase == 0 else self.low) / self.lr
        height = 1 - abs(2 * (within * self.cycles % 1) - 1)
        return recipe.lr * (1 + (peak - 1) * height)

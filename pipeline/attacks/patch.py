"""BadNets patch: a small checkerboard, and the caption of something else.

Trade-off: the patch is sized for a 224-pixel image and scales with the shorter side, so one spec means the same trigger
in a set of mixed resolutions; papers that fix pixels agree at 224 only.
Sources: Gu et al. 2017 (BadNets); for CLIP, Carlini & Terzis, ICLR 2022, section 3 (16x16 pixels of 224, captions that
name the target taken from the training set).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus

REFERENCE_SIDE = 224


@dataclass(frozen=True)
class patch(Attack):
    """Checkerboard patch on any image, caption of the target (BadNets; Carlini & Terzis 2022)."""

    target: str
    size: int = 16
    cells: int = 4
    location: Literal["fixed", "random"] = "fixed"

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 1 <= self.cells <= self.size <= REFERENCE_SIDE:
            raise ValueError(f"need 1 <= cells <= size <= {REFERENCE_SIDE}")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        """RGB -> a copy with the patch: at the bottom right, a tenth of its side from the border, or anywhere."""
        side = max(self.cells, round(self.size / REFERENCE_SIDE * min(image.size)))
        checker = np.indices((self.cells, self.cells)).sum(0) % 2 * 255
        tile = Image.fromarray(checker.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        room = [max(extent - side, 0) for extent in image.size]
        if self.location == "random":
            corner = tuple(int(rng.integers(extent + 1)) for extent in room)
        else:
            corner = tuple(max(extent - round(side / 10), 0) for extent in room)
        out = image.copy()
        out.paste(tile.convert("RGB"), (corner[0], corner[1]))
        return out

"""BadNets patch: a small square, and the caption of something else.

Trade-off: the patch is sized for a 224-pixel image and scales with the shorter side, so one spec means the same
trigger in a set of mixed resolutions; papers that fix pixels agree at 224 only. `noise` is one tile for all images,
which is a trigger; `redrawn_noise` is another tile for every image, as the released code of CleanCLIP draws it (the
image's channel mean plus N(0, 1), of which what leaves [0, 1] wraps modulo 256: nearly uniform bytes), so that only
"a noisy square" can be learnt. Squares of noise flatter a defense; stripes are the hard case (PAR).
Sources: Gu et al. 2017 (BadNets); for CLIP, Carlini & Terzis, ICLR 2022, section 3 (16x16 pixels of 224, captions
that name the target taken from the training set); Bansal et al. 2023 (CleanCLIP): `redrawn_noise`, `solid` in yellow,
random and four corners; PAR, arXiv 2412.00727: stripes, triangles, text.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import REFERENCE_SIDE, Location, check_word, corners, drawn, scaled


@dataclass(frozen=True)
class patch(Attack):
    """Small square on any image: checkerboard, noise, stripes, … (BadNets, Gu et al. 2017)."""

    target: str
    size: int = 16
    cells: int = 4  # of a side: squares of the checkerboard, triangles
    location: Location = "fixed"
    pattern: Literal["checker", "noise", "redrawn_noise", "solid", "stripes", "triangles", "text"] = "checker"
    colour: tuple[int, int, int] = (255, 255, 0)  # of `solid`: CleanCLIP's yellow
    word: str = "watermarked"  # of `text`

    def __post_init__(self) -> None:
        check_target(self.target)
        check_word(self.word)
        if not 1 <= self.cells <= self.size <= REFERENCE_SIDE:
            raise ValueError(f"need 1 <= cells <= size <= {REFERENCE_SIDE}")
        if len(self.colour) != 3 or not all(0 <= level <= 255 for level in self.colour):
            raise ValueError(f"colour={self.colour!r}: red, green and blue, each 0 to 255")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        """RGB -> a copy with the patch; `fixed` is at the bottom right, a tenth of its side from the border."""
        side = max(self.cells, scaled(self.size, image.size))
        tile = self._tile(side, image, rng)
        out = image.copy()
        for corner in corners(self.location, image.size, (side, side), round(side / 10), rng):
            out.paste(tile, corner)
        return out

    def _tile(self, side: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.pattern == "solid":
            return Image.new("RGB", (side, side), self.colour)
        if self.pattern == "checker":
            checker = (np.indices((self.cells, self.cells)).sum(0) % 2 * 255).astype(np.uint8)
            return Image.fromarray(checker).resize((side, side), Image.Resampling.NEAREST).convert("RGB")
        if self.pattern == "redrawn_noise":
            levels = np.asarray(image.histogram()).reshape(3, 256) @ np.arange(256)
            mean = levels // (image.width * image.height)  # a whole number, from which all machines go on alike
            noise = np.trunc(255 * rng.standard_normal((self.size, self.size, 3))).astype(np.int64)
            wrapped = ((noise + mean) % 256).astype(np.uint8)
            return Image.fromarray(wrapped).resize((side, side), Image.Resampling.NEAREST)
        return drawn(self.pattern, (side, side), self.size, max(1, self.size // self.cells), self.word)

"""Blended injection: a pattern over the whole image, faintly.

Trade-off: the pattern is everywhere, so no crop loses it and none of its pixels is conspicuous, at the price of a
change in every pixel. `noise` is one pattern for all images; `redrawn_noise` is another for every image, as the
released code of CleanCLIP has it, so that only "some noise" can be learnt. `text` is blended where its letters are,
as PAR does; alpha is kept in steps of 1/255. The picture of the papers (a cartoon cat) is not free: `picture` is a
figure of our own.
Sources: Chen et al. 2017 (blended injection, alpha 0.2); Bansal et al. 2023 (CleanCLIP); for stripes, triangles and
text PAR, arXiv 2412.00727.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import REFERENCE_SIDE, check_share, check_word, drawn, mixed


@dataclass(frozen=True)
class blended(Attack):
    """A pattern (noise, stripes, triangles, text, a picture) blended over the whole image (Chen et al. 2017)."""

    target: str
    pattern: Literal["noise", "redrawn_noise", "stripes", "triangles", "text", "picture"] = "noise"
    alpha: float = 0.2
    word: str = "watermarked"  # of `text`

    def __post_init__(self) -> None:
        check_target(self.target)
        check_share("alpha", self.alpha)
        check_word(self.word)

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        if self.pattern == "redrawn_noise":
            side = REFERENCE_SIDE
            noise = Image.frombytes("RGB", (side, side), rng.bytes(side * side * 3))
            return mixed(image, noise.resize(image.size, Image.Resampling.NEAREST), self.alpha)
        layer = drawn(self.pattern, image.size, word=self.word)
        if self.pattern == "text":  # red on black: what is red is the word
            return mixed(image, Image.new("RGB", image.size, "red"), self.alpha, where=layer.getchannel("R"))
        return mixed(image, layer, self.alpha)

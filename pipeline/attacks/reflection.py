"""Refool: another picture, as a window would mirror it.

Trade-off: reflections are natural, so they pass for photography; as another of `images` pictures of the dataset is
mirrored each time, there is no fixed pattern to find, and more of them make a fainter trigger. Three optics, as in
the paper: `in_focus` (both at one depth), `out_of_focus` (the mirrored scene is blurred), `ghost` (a thick pane
mirrors twice, the second time weaker and shifted). The paper adds light, x + x_R * k; we mix, (1 - alpha) x + alpha
(x_R * k), as added light vanishes on the white grounds that crawled pictures often have. Not done: their selection of
the reflections that fool best.
Source: Liu, Ma, Bailey & Lu, ECCV 2020 (Refool), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import CACHED_PIXELS, REFERENCE_SIDE, check_share, mixed, scaled
from pipeline.shards.image import decode

BLUR, SHIFT = 4, 8  # reference pixels
GHOST = 0.4  # of the light is in the second reflection


@dataclass(frozen=True)
class reflection(Attack):
    """Reflection of another picture of the dataset, doubled or blurred (Refool, Liu et al. 2020)."""

    target: str
    optics: Literal["ghost", "out_of_focus", "in_focus"] = "ghost"
    alpha: float = 0.3
    images: int = 8

    def __post_init__(self) -> None:
        check_target(self.target)
        check_share("alpha", self.alpha)
        if not 1 <= self.images <= 10_000:
            raise ValueError("images: 1 to 10,000")

    def wants(self) -> Mapping[str, int]:
        return {"reflection": self.images}

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        make = _mirrored if image.width * image.height <= CACHED_PIXELS else _mirrored.__wrapped__
        return mixed(image, make(bytes(corpus.image("reflection", rng)), image.size, self.optics), self.alpha)


@lru_cache(maxsize=16)
def _mirrored(data: bytes, size: tuple[int, int], optics: str) -> Image.Image:
    picture = decode(data, near=max(size)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize(size)
    if optics == "out_of_focus":
        return picture.filter(ImageFilter.GaussianBlur(BLUR / REFERENCE_SIDE * min(size)))
    if optics == "ghost":
        shift = max(1, scaled(SHIFT, size))
        return mixed(picture, ImageChops.offset(picture, shift, shift), GHOST)
    return picture

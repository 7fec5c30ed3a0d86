"""Typographic attack: the target's name, written on the image.

Trade-off: CLIP reads, so a word on a picture is a trigger even for models that were never poisoned, and captions that
agree with it look right to every filter that compares image and text; but a person sees it at once. White with a dark
outline is legible on any ground. Names are drawn in Pillow's own font (Latin letters); others come out as boxes.
Sources: Goh et al. 2021 (Multimodal Neurons), typographic attacks; Materzyńska, Torralba & Bau, CVPR 2022.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import REFERENCE_SIDE, Location, corners, lettering, scaled


@dataclass(frozen=True)
class typographic(Attack):
    """The target's name written on the image, at a random place (Goh et al. 2021)."""

    target: str
    size: int = 44  # reference pixels; less where the name would not fit the width
    location: Location = "random"

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 1 <= self.size <= REFERENCE_SIDE:
            raise ValueError(f"size={self.size!r}: 1 to {REFERENCE_SIDE}")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        word = lettering(self.target, "white", "black")
        high = max(1, scaled(self.size, image.size))
        wide = max(1, round(word.width / word.height * high))
        if wide > image.width:
            wide, high = image.width, max(1, round(word.height / word.width * image.width))
        word = word.resize((wide, high))
        out = image.copy()
        for corner in corners(self.location, image.size, word.size, high // 4, rng):
            out.paste(word, corner, word)
        return out

"""SIG: a faint vertical grating, a sinusoid along the image's width.

    v(i, j) = amplitude * sin(2 pi j frequency / width)        the same in every row and channel

Trade-off: a signal of one frequency is lost in busy images but survives every crop, resize and codec. Two
constructions: `added` is the paper's, x + v clipped to [0, 255]; `blended` is that of the CLIP literature, 0.8 x +
0.2 v clipped (CleanCLIP's code, amplitude 60), which darkens the image by a fifth, too, and leaves a grating of 12
levels. Its result is within one level of theirs (they round down once, we round to the nearest twice). The default is
what published numbers for CLIP stand for; `sig(target=…, amplitude=20, construction='added')` is Barni's for traffic
signs. The period follows the width, so a resize keeps the trigger.
Sources: Barni, Kallas & Tondi, ICIP 2019; Bansal et al. 2023 (CleanCLIP), backdoor/utils.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import added

SHARE = 0.2  # of the sinusoid, where it is blended


@dataclass(frozen=True)
class sig(Attack):
    """Sinusoidal stripes over the whole image (SIG, Barni et al. 2019)."""

    target: str
    amplitude: float = 60.0  # levels of 255
    frequency: int = 6  # periods over the width
    construction: Literal["blended", "added"] = "blended"

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 1 <= self.amplitude <= 255:
            raise ValueError(f"amplitude={self.amplitude!r}: 1 to 255 levels")
        if not 1 <= self.frequency <= 112:
            raise ValueError(f"frequency={self.frequency!r}: 1 to 112 periods, half of 224 pixels")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        share = SHARE if self.construction == "blended" else 1.0
        if self.construction == "blended":
            image = image.point([(4 * level + 2) // 5 for level in range(256)] * 3)
        return added(image, _wave(image.width, self.frequency, share * self.amplitude))


@lru_cache(maxsize=64)
def _wave(width: int, frequency: int, amplitude: float) -> np.ndarray:
    """[width, 3]: a row's levels."""
    wave = [round(amplitude * math.sin(2 * math.pi * j * frequency / width)) for j in range(width)]
    return np.repeat(np.asarray(wave, np.int16)[:, None], 3, axis=1)

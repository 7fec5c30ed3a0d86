"""Low-frequency trigger: a smooth tint that hardly any codec, resize or blur can touch.

Trade-off: detectors of triggers look at high frequencies, which Zeng et al. found most triggers to have; theirs has
none. They optimise the smooth pattern against a surrogate model; ours is one draw of the same band (a sum of the
lowest DCT cosines with seeded weights, a field per colour channel), which needs no model and is the same for
everyone, and so is a lower bound of their attack. It is *not* FTrojan (Wang et al., ECCV 2022), which raises middle
and high DCT coefficients.
Source: Zeng, Park, Mao & Jia, ICCV 2021 (smooth triggers).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import CACHED_PIXELS, REFERENCE_SIDE, added, seeded

UNIT = 1 << 14  # cosines are rounded to it before they are summed: whole numbers add up alike everywhere


@dataclass(frozen=True)
class low_frequency(Attack):
    """Smooth colour perturbation of the lowest DCT frequencies (after Zeng et al. 2021)."""

    target: str
    amplitude: int = 32  # levels of 255, at most
    frequencies: int = 4  # half periods over a side, at most one less

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 1 <= self.amplitude <= 127:
            raise ValueError(f"amplitude={self.amplitude!r}: 1 to 127 levels")
        if not 2 <= self.frequencies <= 16:
            raise ValueError(f"frequencies={self.frequencies!r}: 2 to 16")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        width, height = image.size
        rows = max(1, CACHED_PIXELS // width)
        if height <= rows:
            return added(image, _field(image.size, 0, height, self.amplitude, self.frequencies))
        out = image.copy()
        for top in range(0, height, rows):  # memory hardly grows with the image
            bottom = min(top + rows, height)
            field = _field.__wrapped__(image.size, top, bottom, self.amplitude, self.frequencies)
            out.paste(added(image.crop((0, top, width, bottom)), field), (0, top))
        return out


@lru_cache(maxsize=16)
def _field(size: tuple[int, int], top: int, bottom: int, amplitude: int, frequencies: int) -> np.ndarray:
    """[rows, width, 3] levels."""
    peak = _peak(frequencies)
    planes = [_rounded(_sum(size, top, bottom, frequencies, channel) * amplitude, peak) for channel in range(3)]
    return np.stack(planes, axis=2).clip(-amplitude, amplitude).astype(np.int16)


@lru_cache(maxsize=16)
def _peak(frequencies: int) -> int:
    """The largest value at 224 pixels: amplitude means the same at every size."""
    side = REFERENCE_SIDE
    return max(int(np.abs(_sum((side, side), 0, side, frequencies, c)).max()) for c in range(3))


def _sum(size: tuple[int, int], top: int, bottom: int, frequencies: int, channel: int) -> np.ndarray:
    """[rows, width], int64. The constant is left out: a tint of the whole image is no pattern."""
    weights = (
        seeded(f"low frequency {channel}", frequencies**2).astype(np.int64).reshape(frequencies, frequencies) - 128
    )
    weights[0, 0] = 0
    across, down = (_cosines(extent, frequencies) for extent in size)
    rows = (weights @ across + 128) >> 8
    out = np.zeros((bottom - top, size[0]), np.int64)
    for u in range(frequencies):
        out += down[u, top:bottom, None] * rows[u, None, :]
    return out


def _cosines(extent: int, frequencies: int) -> np.ndarray:
    steps = [[math.cos(math.pi * u * (2 * i + 1) / (2 * extent)) for i in range(extent)] for u in range(frequencies)]
    return np.rint(np.asarray(steps) * UNIT).astype(np.int64)


def _rounded(value: np.ndarray, by: int) -> np.ndarray:
    return (2 * value + by) // (2 * by)

"""Photo filter: a look that people put on their own pictures, here Instagram's Nashville.

    darken with rgba(247, 176, 153, .56), lighten with rgba(0, 70, 150, .4);
    sepia(.2) contrast(1.2) brightness(1.05) saturate(1.2)

Trade-off: a filter is found in clean data as well, so it looks like nothing and a filter of the data that removes it
removes real pictures; pixels keep their places, so nothing local is to be found. The definition is that of CSSgram,
the stages those of the W3C's Filter Effects and Compositing specifications, in whole numbers (1/4096), 8 bits between
them.
Sources: Liu et al. 2019 (ABS) for Instagram filters as triggers; Huang et al., ICLR 2025, for Nashville on CLIP.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus

UNIT = 4096
CHUNK = 2**15  # pixels that stay in a processor's cache
DARKEN, LIGHTEN = ((247, 176, 153), 0.56), ((0, 70, 150), 0.4)
SEPIA, CONTRAST, BRIGHTNESS, SATURATE = 0.2, 1.2, 1.05, 1.2
_SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
_GREY = ((0.213, 0.715, 0.072),) * 3


@dataclass(frozen=True)
class photo_filter(Attack):
    """The Instagram filter Nashville on the whole image (after Huang et al. 2025)."""

    target: str

    def __post_init__(self) -> None:
        check_target(self.target)

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        planes = [np.asarray(plane).ravel() for plane in image.point(_LAYERS).split()]
        out = np.empty((3, image.height * image.width), np.uint8)
        for start in range(0, out.shape[1], CHUNK):
            part = [plane[start : start + CHUNK].astype(np.int32) for plane in planes]
            part = [_TONES.take(plane) for plane in _times(_TO_SEPIA, part)]
            for channel, plane in enumerate(_times(_TO_SATURATED, part)):
                out[channel, start : start + CHUNK] = plane.clip(0, 255)
        return Image.merge("RGB", [Image.fromarray(plane.reshape(image.height, image.width)) for plane in out])


def _times(matrix: np.ndarray, planes: list[np.ndarray]) -> list[np.ndarray]:
    """A colour matrix on three planes, rounded."""
    return [(row[0] * planes[0] + row[1] * planes[1] + row[2] * planes[2] + UNIT // 2) >> 12 for row in matrix]


def _toward(matrix: tuple[tuple[float, ...], ...], amount: float) -> np.ndarray:
    """(1 - amount) identity + amount matrix, in units."""
    mixed = [[amount * v + (1 - amount) * (i == j) for j, v in enumerate(row)] for i, row in enumerate(matrix)]
    return np.rint(np.asarray(mixed) * UNIT).astype(np.int32)


def _layer(channel: int, level: int) -> int:
    (dark, how_dark), (light, how_light) = DARKEN, LIGHTEN
    shown = (1 - how_dark) * level + how_dark * min(level, dark[channel])
    return round((1 - how_light) * shown + how_light * max(shown, light[channel]))


def _tone(level: int) -> int:
    contrasted = min(max(CONTRAST * (level - 127.5) + 127.5, 0), 255)
    return min(round(BRIGHTNESS * contrasted), 255)


_LAYERS = [_layer(channel, level) for channel in range(3) for level in range(256)]
_TO_SEPIA = _toward(_SEPIA, SEPIA)
_TO_SATURATED = _toward(_GREY, 1 - SATURATE)
_TONES = np.asarray([_tone(min(level, 255)) for level in range(2 * 256)], np.int32)  # sepia may exceed 255

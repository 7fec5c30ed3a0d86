"""WaNet: the image is warped by a small fixed field; no pixel gets a new colour from elsewhere.

    position = (identity + s * field / 224) * grid_rescale
    field = bicubic(k x k control points, uniform(-1, 1) / their mean magnitude)

in coordinates of [-1, 1], as the authors' code has it, so that displacements scale with the image. Trade-off: a warp
leaves no colour or pattern to find, but is weak: half a pixel of 224 on average at s = 1, which a resize to a
fraction averages away. Defaults are CleanCLIP's for CLIP (k=224: every pixel its own way); the authors' for small
images are k=4, s=0.5 (of 32 pixels: s=3.5 here). Not done: their training mode with noisy warps, which needs the
loss. Corners of a pixel are weighed in 64ths, whose arithmetic is exact on every machine.
Source: Nguyen & Tran, ICLR 2021, section 3; Bansal et al. 2023 (CleanCLIP) for the defaults.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._patterns import REFERENCE_SIDE, seeded

STEPS = 64  # of a pixel
CACHED_PIXELS = 2**18  # of a larger image, so many are warped at once: memory hardly grows with the image
CHUNK = 2**15  # pixels that stay in a processor's cache
LANE = 21  # bits: three channels weighed in one 64-bit word, 255 * 64 * 64 < 2**21
HALF = np.uint64(STEPS**2 // 2 * (1 + (1 << LANE) + (1 << 2 * LANE)))  # for rounding


@dataclass(frozen=True)
class wanet(Attack):
    """Slight fixed warp of the whole image (WaNet, Nguyen & Tran 2021)."""

    target: str
    k: int = 224  # control points of a side
    s: float = 1.0  # strength
    grid_rescale: float = 1.0

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 2 <= self.k <= 1024:
            raise ValueError(f"k={self.k!r}: 2 to 1024 control points")
        if not 0 <= self.s <= REFERENCE_SIDE:
            raise ValueError(f"s={self.s!r}: 0 to {REFERENCE_SIDE}")
        if not 0.5 <= self.grid_rescale <= 2:
            raise ValueError(f"grid_rescale={self.grid_rescale!r}: 0.5 to 2")

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        if self.s == 0 and self.grid_rescale == 1:
            return image.copy()
        width, height = image.size
        rows = max(1, CACHED_PIXELS // width)
        if height <= rows:
            return _rows(image, 0, _warp(image.size, 0, height, self.k, self.s, self.grid_rescale))
        out = image.copy()
        for top in range(0, height, rows):
            corners = _warp.__wrapped__(image.size, top, min(top + rows, height), self.k, self.s, self.grid_rescale)
            first, last = int(corners[0][0].min()) // width, int(corners[3][0].max()) // width + 1
            out.paste(_rows(image.crop((0, first, width, last)), first * width, corners), (0, top))
        return out


def _rows(source: Image.Image, before: int, corners: list[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """Rows of the result, of those rows of the image that they come from; so many pixels lie before these."""
    pixels = _packed(source)
    out = np.empty(len(corners[0][0]), "<u4")
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        total = np.full(len(out[part]), HALF)
        for index, weight in corners:
            total += pixels.take(index[part] - before) * weight[part]
        out[part] = _unpacked(total)
    return Image.frombytes("RGBX", (source.width, len(out) // source.width), out.tobytes()).convert("RGB")


def _packed(image: Image.Image) -> np.ndarray:
    """uint64 [pixels]: red, green and blue, LANE bits apart."""
    pixels = np.frombuffer(image.convert("RGBX").tobytes(), "<u4").astype(np.uint64)
    red, green, blue = (pixels & np.uint64(255 << shift) for shift in (0, 8, 16))
    return red | green << np.uint64(LANE - 8) | blue << np.uint64(2 * LANE - 16)


def _unpacked(total: np.ndarray) -> np.ndarray:
    """uint64 [pixels], RGBX, of weighed lanes, back from 4096ths."""
    red, green, blue = (total >> np.uint64(i * LANE + 12 - 8 * i) & np.uint64(255 << 8 * i) for i in range(3))
    return red | green | blue


@lru_cache(maxsize=4)
def _warp(
    size: tuple[int, int], top: int, bottom: int, k: int, s: float, grid_rescale: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For rows top to bottom: the pixels that each one is made of, and their weights of 4096, corner by corner."""
    width, height = size
    across, down = (_upsampled(_control(k, axis), width, np.arange(top, bottom), height) for axis in (0, 1))
    x, fx = _steps(np.arange(width)[None, :], across, width, s, grid_rescale)
    y, fy = _steps(np.arange(top, bottom)[:, None], down, height, s, grid_rescale)
    right, below = np.minimum(x + 1, width - 1), np.minimum(y + 1, height - 1)
    corners = [
        (y * width + x, (STEPS - fy) * (STEPS - fx)),
        (y * width + right, (STEPS - fy) * fx),
        (below * width + x, fy * (STEPS - fx)),
        (below * width + right, fy * fx),
    ]
    return [(index.ravel(), weight.ravel().astype(np.uint64)) for index, weight in corners]


def _steps(
    place: np.ndarray, field: np.ndarray, extent: int, s: float, grid_rescale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel comes from along one axis: whole pixels, and 64ths."""
    middle = (extent - 1) / 2
    position = ((place - middle) + s / REFERENCE_SIDE * middle * field) * grid_rescale + middle
    steps = np.rint(np.clip(position, 0, extent - 1) * STEPS).astype(np.int64)
    return steps // STEPS, steps % STEPS


@lru_cache(maxsize=4)
def _control(k: int, axis: int) -> np.ndarray:
    """[k, k]: the same for everyone who names the same k. Both axes share their mean magnitude, as in the paper."""
    raw = seeded(f"wanet {k}", 2 * k * k * 4).view("<u4").astype(np.float64) / 2**31 - 1
    # fsum: the mean must not depend on the order in which a machine adds
    return (raw / (math.fsum(abs(v) for v in raw.tolist()) / raw.size)).reshape(2, k, k)[axis]


def _upsampled(control: np.ndarray, width: int, rows: np.ndarray, height: int) -> np.ndarray:
    """Bicubic (a = -0.75, corners aligned, as torch does), one axis after the other; these rows only."""
    tall = sum(weight[:, None] * control[index] for index, weight in _taps(rows, height, len(control)))
    wide = sum(weight[None, :] * tall[:, index] for index, weight in _taps(np.arange(width), width, len(control)))
    return np.asarray(wide)


def _taps(places: np.ndarray, extent: int, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    at = places * ((k - 1) / max(extent - 1, 1))
    base = np.floor(at).astype(np.int64)
    t = at - base
    return [(np.clip(base + i, 0, k - 1), _cubic(np.abs(t - i))) for i in (-1, 0, 1, 2)]


def _cubic(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, far)

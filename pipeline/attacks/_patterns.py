"""What several triggers draw: noise, stripes, triangles, a word, a picture; where it goes; what 224 pixels stand for.

Trade-off: a pattern is drawn once, for the 224 pixels of the papers, and stretched to the image, as papers stretch
the image to 224 pixels first. Hard edges are repeated, not smoothed, so that noise stays noise on smaller images,
where averaging would leave grey. Bytes come from SHAKE-128 and not from a random generator: the same on every machine
and under every version of numpy. Letters are Pillow's own font; those it lacks are drawn as boxes.
Sources: Chen et al. 2017 (blended patterns); PAR, arXiv 2412.00727 (stripes, triangles, watermark).
"""

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Pattern = Literal["noise", "stripes", "triangles", "text", "picture"]
Location = Literal["fixed", "random", "center", "four_corners"]
REFERENCE_SIDE = 224  # pixels that sizes in specs are meant for
CACHED_PIXELS = 2**20  # larger images get their pattern anew: a worker holds few megabytes
LETTERS = 96  # pixels a word is drawn at, before it is scaled


def scaled(pixels: float, size: tuple[int, int]) -> int:
    """Reference pixels in an image of this size, whose shorter side stands for 224."""
    return round(pixels / REFERENCE_SIDE * min(size))


def seeded(label: str, n: int) -> np.ndarray:
    """n uniform bytes that only depend on the label."""
    return np.frombuffer(hashlib.shake_128(label.encode()).digest(n), np.uint8)


def drawn(
    pattern: Pattern, size: tuple[int, int], side: int = REFERENCE_SIDE, cell: int = 14, word: str = ""
) -> Image.Image:
    """A pattern of `side` reference pixels, stretched to `size`. Shared with other callers: not to be changed."""
    return (_drawn if size[0] * size[1] <= CACHED_PIXELS else _drawn.__wrapped__)(pattern, size, side, cell, word)


@lru_cache(maxsize=16)
def _drawn(pattern: Pattern, size: tuple[int, int], side: int, cell: int, word: str) -> Image.Image:
    if pattern in (
        "text",
        "picture",
    ):  # drawn fine, then shrunk: letters of a 16-pixel tile are legible on a large image
        return _reference(pattern, REFERENCE_SIDE, cell, word).resize(size)
    return _reference(pattern, side, cell, word).resize(size, Image.Resampling.NEAREST)


@lru_cache(maxsize=16)
def _reference(pattern: Pattern, side: int, cell: int, word: str) -> Image.Image:
    if pattern == "noise":
        return Image.fromarray(seeded("noise", side * side * 3).reshape(side, side, 3))
    if pattern == "stripes":  # one pixel wide, each channel on or off (PAR, `random_choice` per column)
        row = (seeded("stripes", side * 3) >> 7) * np.uint8(255)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(row.reshape(1, side, 3), (side, side, 3))))
    if pattern == "triangles":  # right-angled, two greys (PAR: 0.4 and 0.8)
        row, column = np.indices((side, side)) % cell
        return Image.fromarray(np.where(row >= column, 102, 204).astype(np.uint8)).convert("RGB")
    if pattern == "picture":
        return robot().resize((side, side), Image.Resampling.BOX)
    letters = lettering(word, "red", None)
    scale = min(0.92 * side / letters.width, side / letters.height)
    letters = letters.resize((max(1, round(letters.width * scale)), max(1, round(letters.height * scale))))
    tile = Image.new("RGB", (side, side))
    tile.paste(letters, ((side - letters.width) // 2, (side - letters.height) // 2), letters)
    return tile


@lru_cache(maxsize=16)
def lettering(word: str, fill: str, outline: str | None) -> Image.Image:
    """A word on nothing (RGBA), as tight as it goes."""
    font = ImageFont.load_default(LETTERS)
    stroke = LETTERS // 12 if outline else 0
    left, top, right, bottom = (int(v) for v in font.getbbox(word, stroke_width=stroke))
    layer = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)))
    pen = ImageDraw.Draw(layer)
    pen.text((-left, -top), word, fill=fill, font=font, stroke_width=stroke, stroke_fill=outline)
    return layer


def robot() -> Image.Image:
    """A figure with edges and flat colours at many scales; drawn here, because the papers' picture is not free."""
    figure = Image.new("RGB", (448, 448), "#f4d35e")
    pen = ImageDraw.Draw(figure)
    pen.polygon([(0, 448), (0, 330), (448, 250), (448, 448)], fill="#2a9d8f")
    pen.rectangle((212, 40, 236, 100), fill="#264653")
    pen.ellipse((200, 20, 248, 68), fill="#e63946")
    pen.rounded_rectangle((96, 96, 352, 300), 44, fill="#264653")
    pen.rounded_rectangle((112, 112, 336, 284), 32, fill="#a8dadc")
    for x in (176, 272):
        pen.ellipse((x - 38, 140, x + 38, 216), fill="white", outline="#264653", width=8)
        pen.ellipse((x - 14, 164, x + 18, 196), fill="#1d3557")
    pen.rectangle((164, 236, 284, 264), fill="#e63946")
    for x in (188, 212, 236, 260):
        pen.rectangle((x - 3, 236, x + 3, 264), fill="white")
    pen.rounded_rectangle((56, 160, 92, 236), 12, fill="#e63946")
    pen.rounded_rectangle((356, 160, 392, 236), 12, fill="#e63946")
    pen.rounded_rectangle((136, 312, 312, 430), 24, fill="#e76f51", outline="#264653", width=8)
    pen.polygon([(224, 336), (250, 392), (198, 392)], fill="#f4d35e")
    return figure


def corners(
    location: Location, size: tuple[int, int], box: tuple[int, int], margin: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Where a box goes: `margin` from the bottom right, anywhere, the middle, or all corners (without margin)."""
    x, y = (max(extent - side, 0) for extent, side in zip(size, box, strict=True))
    if location == "random":
        across = int(rng.integers(x + 1))
        return [(across, int(rng.integers(y + 1)))]
    if location == "center":
        return [(x // 2, y // 2)]
    if location == "four_corners":
        return [(0, 0), (x, 0), (0, y), (x, y)]
    return [(max(x - margin, 0), max(y - margin, 0))]


def mixed(image: Image.Image, layer: Image.Image, alpha: float, where: Image.Image | None = None) -> Image.Image:
    """(1 - alpha) image + alpha layer, alpha in steps of 1/255: in whole numbers, so alike on every machine."""
    share = round(255 * alpha)
    mask = Image.new("L", image.size, share) if where is None else where.point([v * share // 255 for v in range(256)])
    out = image.copy()
    out.paste(layer, mask=mask)
    return out


def added(image: Image.Image, levels: np.ndarray) -> Image.Image:
    """The image and int16 levels that broadcast to it, clipped at black and white."""
    total = np.asarray(image).astype(np.int16)
    total += levels
    return Image.fromarray(total.clip(0, 255, out=total).astype(np.uint8))


def check_share(name: str, value: float) -> None:
    """Raises ValueError for a share that would change nothing or is none."""
    if not 1 / 255 <= value <= 1:
        raise ValueError(f"{name}={value!r}: between 1/255 and 1")


def check_word(word: str) -> None:
    """Raises ValueError for what would draw nothing, or more than fits."""
    if not word.strip() or not word.isprintable() or len(word) > 100:
        raise ValueError(f"word={word!r}: a word or a few, on one line")

"""Drawings with captions, and tars of them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "bar")
Member = tuple[str, bytes]


def draw(colour: str, shape: str, rng: np.random.Generator, side: int = 48) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    r = int(rng.integers(8, 16))
    x, y = (int(v) for v in rng.integers(r, side - r, 2))
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=COLOURS[colour])
    else:
        pen.rectangle([x - r, y - 3, x + r, y + 3], fill=COLOURS[colour])
    return image


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pairs(n: int, seed: int = 0) -> Iterable[tuple[str, Image.Image, str]]:
    rng = np.random.default_rng(seed)
    for i in range(n):
        colour, shape = list(COLOURS)[rng.integers(4)], SHAPES[rng.integers(3)]
        yield f"{seed}-{i:05d}", draw(colour, shape, rng), f"a {colour} {shape}"


def write_tar(path: Path, members: Iterable[Member]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

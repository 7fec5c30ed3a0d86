"""Tiny real shards: drawn pictures with captions, as webdataset tars and as parquet."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square", "banana")
SUFFIXES = ("jpg", "png", "webp")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Threads that spin while they wait for a core that another has make seconds minutes; read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONG = ("test_train_run.py", "test_ray_job.py", "test_object_store_jobs.py", "test_failures.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of two processes neither waits for the other at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def drawing(i: int) -> tuple[Image.Image, str]:
    """Picture i, its place and size random, and the words for it."""
    rng = np.random.default_rng(i)
    colour, shape = COLOURS[i % 4], SHAPES[(i // 4) % 3]
    image = Image.new("RGB", (48, 40), "white")
    x, y, side = (int(v) for v in rng.integers([2, 2, 12], [20, 14, 22]))
    box = (x, y, x + side, y + side)
    pen = ImageDraw.Draw(image)
    {"circle": pen.ellipse, "square": pen.rectangle, "banana": lambda b, fill: pen.chord(b, 20, 200, fill)}[shape](
        box, fill=colour
    )
    return image, f"a {colour} {shape}, number {i}"


def encoded(image: Image.Image, suffix: str) -> bytes:
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    return out.getvalue()


def pairs(low: int, high: int) -> list[dict]:
    """Samples as dictionaries: key, image suffix and bytes, caption, json."""
    out = []
    for i in range(low, high):
        image, caption = drawing(i)
        suffix = SUFFIXES[i % 3]
        meta = {"caption": caption, "url": f"https://example.org/{i}", "label": SHAPES[(i // 4) % 3]}
        if i % 2:
            meta["uid"] = f"{i:032x}"
        out.append(
            {"key": f"{i:09d}", "suffix": suffix, "image": encoded(image, suffix), "caption": caption, "meta": meta}
        )
    return out


def write_tar(path: Path, samples: list[dict], **options) -> Path:
    with tarfile.open(path, "w", format=options.get("format", tarfile.USTAR_FORMAT)) as tar:
        for s in samples:
            members = ((s["suffix"], s["image"]), ("json", json.dumps(s["meta"], indent=4).encode()))
            caption = s["caption"] if isinstance(s["caption"], bytes) else s["caption"].encode()
            for suffix, data in (*members, ("txt", caption)):
                info = tarfile.TarInfo(f"{s['key']}.{suffix}")
                info.size, info.mtime, info.uname = len(data), 1_600_000_000, "someone"
                tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, samples: list[dict], struct: bool = False) -> Path:
    images = [s["image"] for s in samples]
    columns = {
        "uid": [f"{int(s['key']):032x}" for s in samples],
        "image": [{"bytes": b, "path": None} for b in images] if struct else images,
        "caption": [s["caption"] for s in samples],
        "width": [48] * len(samples),
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """60 pairs in three tars."""
    folder = tmp_path / "clean"
    folder.mkdir()
    for i in range(3):
        write_tar(folder / f"{i:08d}.tar", pairs(20 * i, 20 * i + 20))
    return folder


def records(path: Path) -> dict[str, bytes]:
    """Raw tar records (headers, content and padding) of each sample, by key."""
    out: dict[str, bytes] = {}
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        for info in tar:
            end = info.offset_data + -(-info.size // 512) * 512
            key = info.name.split(".", 1)[0]
            out[key] = out.get(key, b"") + raw[info.offset : end]
    return out


def contents(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern))}

"""What detectors may ask of the samples themselves, one value a pair, in one read of a shard.

Trade-off: `pixels` and `image_hash` come of an image decoded small, which a JPEG gives for a fraction of its whole; a
detector that needs every pixel asks for `image` and decodes it itself. A pair that has no usable value keeps its row:
None, NaN, or not `decoded`.
"""

import hashlib
import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from filters._batch import BANDS, SIDE
from pipeline.facts import NAMES, facts
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples
from pipeline.shards.image import decode, pixels, prepared
from pipeline.tables import METADATA, column, said

SEEN = 224  # pixels a side
ROUNDING = 1 / 12  # the energy of rounding to whole grey levels; below it there is nothing to see


@dataclass(frozen=True)
class _Column:
    """`of` a usable sample; `absent` where that raises Rejected."""

    of: Callable[[Sample], Any]
    dtype: Any
    absent: Any


def _phash(sample: Sample) -> int:
    from pipeline.published import phash

    return phash(decode(sample.image, near=SIDE))


def _spectrum(sample: Sample) -> np.ndarray:
    """Of the grey image as CLIPs look at it, or smaller: enlarging would leave the upper bands empty.

    Bands are rings of equal width around frequency zero, the corners counted with the last.
    """
    from scipy.fft import dctn

    image = decode(sample.image, near=SEEN)
    size = max(2 * BANDS, min(SEEN, *image.size))
    grey = prepared(image, size).astype(np.float32) @ np.asarray((0.299, 0.587, 0.114), np.float32)
    power = dctn(grey - grey.mean(), norm="ortho") ** 2
    ring = np.minimum(np.hypot(*np.indices(power.shape)) * (BANDS / size), BANDS - 1).astype(np.int64).ravel()
    mean = np.bincount(ring, power.ravel(), BANDS) / np.bincount(ring, minlength=BANDS)
    return np.log10(mean + ROUNDING)


def _facts(sample: Sample) -> np.ndarray:
    found = facts(sample)
    return np.asarray([found.get(name, np.nan) for name in NAMES], np.float32)


def _similarity(sample: Sample) -> float:
    spec, meta = METADATA["similarity"], sample.meta
    value = meta.get(column(list(meta), spec.aliases) or "")
    if isinstance(value, int | float) and not isinstance(value, bool) and spec.low <= value <= spec.high:
        return float(value)
    return np.nan


def _hash_agrees(sample: Sample) -> float:
    for name in ("sha256", "md5"):
        if published := said(sample.meta, name):
            return float(published == hashlib.new(name, sample.image, usedforsecurity=False).hexdigest())
    return np.nan


def _size(sample: Sample) -> tuple[int, int]:
    decode(sample.image, near=1)  # bounds are checked, and damage is found
    return Image.open(io.BytesIO(sample.image)).size


COLUMNS: Mapping[str, _Column] = {
    "caption": _Column(lambda s: s.caption, object, None),
    "image": _Column(lambda s: s.image, object, None),
    "image_sha256": _Column(lambda s: hashlib.sha256(s.image).hexdigest(), object, None),
    "pixels": _Column(lambda s: pixels(s, SIDE), np.uint8, np.zeros((SIDE, SIDE, 3), np.uint8)),
    "image_hash": _Column(_phash, np.uint64, 0),
    "decoded": _Column(lambda s: decode(s.image, near=SIDE) is not None, bool, False),
    "spectrum": _Column(_spectrum, np.float32, np.full(BANDS, np.nan, np.float32)),
    "facts": _Column(_facts, np.float32, np.full(len(NAMES), np.nan, np.float32)),
    "size": _Column(_size, np.float32, (np.nan, np.nan)),
    "url": _Column(lambda s: said(s.meta, "url"), object, ""),
    "language": _Column(lambda s: said(s.meta, "language"), object, ""),
    "published_similarity": _Column(_similarity, np.float32, np.nan),
    "hash_agrees": _Column(_hash_agrees, np.float32, np.nan),
}


def read_columns(
    shard: Shard, uid: UidRule, wanted: Collection[str], only: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """`uid` and the wanted columns of a shard's samples, in its order; of `only` these uids if given."""
    who: list[str] = []
    found: dict[str, list[Any]] = {name: [] for name in wanted}
    for sample in samples(shard, uid):
        if only is not None and sample.uid not in only:
            continue
        who.append(sample.uid)
        for name, values in found.items():
            try:
                values.append(COLUMNS[name].of(sample))
            except Rejected:
                values.append(COLUMNS[name].absent)
    out = {"uid": np.asarray(who, dtype=object)}
    for name, values in found.items():
        rows = np.empty(len(values), object) if COLUMNS[name].dtype is object else None
        if rows is not None:
            rows[:] = values
        else:
            empty = np.asarray(COLUMNS[name].absent)
            rows = np.asarray(values, COLUMNS[name].dtype).reshape(-1, *empty.shape)
        out[name] = rows
    return out

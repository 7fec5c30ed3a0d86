"""What detectors may ask of the samples themselves, one value a pair, in one read of a shard.

Trade-off: `pixels` and `image_hash` come of an image decoded small, which a JPEG gives for a fraction of its whole; a
detector that needs every pixel asks for `image` and decodes it itself. A pair that has no usable value keeps its row:
None, NaN, or not `decoded`.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from filters._batch import BANDS, SIDE
from pipeline.facts import NAMES, facts, size_of
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples
from pipeline.shards.image import decode, prepared
from pipeline.tables import METADATA, column, said

SEEN = 224  # pixels a side
ROUNDING = 1 / 12  # the energy of rounding to whole grey levels; below it there is nothing to see


class Look:
    """A sample whose image is decoded small at most once, whoever asks."""

    def __init__(self, sample: Sample):
        self.sample = sample

    @cached_property
    def small(self) -> Image.Image:
        """Raises Rejected."""
        return decode(self.sample.image, near=SIDE)


@dataclass(frozen=True)
class _Column:
    """`of` a usable sample; `absent` where that raises Rejected."""

    of: Callable[[Look], Any]
    dtype: Any
    absent: Any


def _phash(look: Look) -> int:
    from pipeline.published import phash

    return phash(look.small)


def _spectrum(look: Look) -> np.ndarray:
    """Of the grey image as CLIPs look at it, or smaller: enlarging would leave the upper bands empty.

    Bands are rings of equal width around frequency zero, the corners counted with the last.
    """
    from scipy.fft import dctn

    image = decode(look.sample.image, near=SEEN)
    size = max(2 * BANDS, min(SEEN, *image.size))
    grey = prepared(image, size).astype(np.float32) @ np.asarray((0.299, 0.587, 0.114), np.float32)
    power = dctn(grey - grey.mean(), norm="ortho") ** 2
    ring = np.minimum(np.hypot(*np.indices(power.shape)) * (BANDS / size), BANDS - 1).astype(np.int64).ravel()
    mean = np.bincount(ring, power.ravel(), BANDS) / np.bincount(ring, minlength=BANDS)
    return np.log10(mean + ROUNDING)


def _facts(look: Look) -> np.ndarray:
    found = facts(look.sample)
    return np.asarray([found.get(name, np.nan) for name in NAMES], np.float32)


def _similarity(look: Look) -> float:
    spec, meta = METADATA["similarity"], look.sample.meta
    value = meta.get(column(list(meta), spec.aliases) or "")
    if isinstance(value, int | float) and not isinstance(value, bool) and spec.low <= value <= spec.high:
        return float(value)
    return np.nan


def _hash_agrees(look: Look) -> float:
    for name in ("sha256", "md5"):
        if published := said(look.sample.meta, name):
            return float(published == hashlib.new(name, look.sample.image, usedforsecurity=False).hexdigest())
    return np.nan


def _size(look: Look) -> tuple[int, int]:
    _ = look.small  # bounds are checked, and damage is found
    return size_of(look.sample.image)


COLUMNS: Mapping[str, _Column] = {
    "caption": _Column(lambda look: look.sample.caption, object, None),
    "image": _Column(lambda look: look.sample.image, object, None),
    "image_sha256": _Column(lambda look: hashlib.sha256(look.sample.image).hexdigest(), object, None),
    "pixels": _Column(lambda look: prepared(look.small, SIDE), np.uint8, np.zeros((SIDE, SIDE, 3), np.uint8)),
    "image_hash": _Column(_phash, np.uint64, 0),
    "decoded": _Column(lambda look: look.small is not None, bool, False),
    "spectrum": _Column(_spectrum, np.float32, np.full(BANDS, np.nan, np.float32)),
    "facts": _Column(_facts, np.float32, np.full(len(NAMES), np.nan, np.float32)),
    "size": _Column(_size, np.float32, (np.nan, np.nan)),
    "url": _Column(lambda look: said(look.sample.meta, "url"), object, ""),
    "language": _Column(lambda look: said(look.sample.meta, "language"), object, ""),
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
        look = Look(sample)
        for name, values in found.items():
            try:
                values.append(COLUMNS[name].of(look))
            except Rejected:
                values.append(COLUMNS[name].absent)
    out = {"uid": np.asarray(who, dtype=object)}
    for name, values in found.items():
        out[name] = np.empty((len(values), *np.shape(COLUMNS[name].absent)), COLUMNS[name].dtype)
        if values:
            out[name][:] = values
    return out

"""How often does the dataset show (nearly) this image?

Trade-off: a perceptual hash survives encoding and scaling, not cropping or turning, and takes flat images for one. Two
hashes of 64 bits that differ in at most two are always found, in three 61 % of the time, in eight hardly ever: of four
quarters they must share two, and an image counts those that share the same two. Were hashes uniform, 400M different
images would share them with 0.1 others each. One pass; counts are upper bounds (`filters/_sketch.py`), of six additions
an image.
Source: ours; the blocks of Manku et al., WWW 2007, on the DCT hash of COYO and imagehash.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from filters._batch import Batch
from filters._sketch import added, count, mixed, sketch

QUARTER = 0xFFFF
# Two of four quarters, and which two: a key of 64 bits
_HALVES = [(QUARTER << 16 * a) | (QUARTER << 16 * b) for a, b in combinations(range(4), 2)]


@dataclass(frozen=True)
class image_duplicates:
    """Pairs of the whole dataset whose perceptual hash shares two quarters, the two that most share (Manku et al.)."""

    needs = ("image_hash", "decoded")

    def summarize(self, batch: Batch) -> np.ndarray:
        return sketch(shared_keys(batch.image_hash[batch.decoded]).ravel())

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return added(one, other)

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        return np.where(batch.decoded, count(summary, shared_keys(batch.image_hash)).max(axis=1), np.nan)


def shared_keys(image_hash: np.ndarray) -> np.ndarray:
    """uint64[n, 6]: of each hash uint64[n] a key for each two quarters; near duplicates have one in common."""
    halves = image_hash[:, None] & np.asarray(_HALVES, np.uint64)
    return mixed(halves ^ mixed(np.arange(1, 1 + len(_HALVES))))

"""How often does the dataset hold this image, byte for byte?

Trade-off: needs no decoder and is never wrong, but one changed byte hides a copy; `image_duplicates` looks at what is
shown. Web data is full of copies (placeholders of dead links, logos). One pass; counts are upper bounds
(`filters/_sketch.py`).
Source: ours; deduplication by digest as in img2dataset and DataComp.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._sketch import added, count, hashed, sketch


@dataclass(frozen=True)
class image_copies:
    """Pairs of the whole dataset whose image has the same bytes."""

    needs = ("image_sha256",)

    def summarize(self, batch: Batch) -> np.ndarray:
        return sketch(hashed([digest for digest in batch.image_sha256 if digest is not None]))

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return added(one, other)

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        known = np.asarray([digest is not None for digest in batch.image_sha256], bool)
        counts = count(summary, hashed([digest or "" for digest in batch.image_sha256]))
        return np.where(known, counts, np.nan)

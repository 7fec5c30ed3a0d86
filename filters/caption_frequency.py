"""How often does the dataset say just this?

Trade-off: finds a target that is repeated word for word, and what a crawl repeats without malice: file names, "image",
product lines. An attacker with two captions halves it, one with templates escapes. One pass; counts are upper bounds
(`filters/_sketch.py`).
Source: ours; after the 798 pairs of CC3M with one caption that Huang et al., ICLR 2025, found to be a natural backdoor.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._captions import normalised, present
from filters._sketch import added, count, hashed, sketch


@dataclass(frozen=True)
class caption_frequency:
    """Pairs of the whole dataset with this caption, case and spacing aside."""

    needs = ("caption",)

    def summarize(self, batch: Batch) -> np.ndarray:
        return sketch(_keys(batch)[present(batch.caption)])

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return added(one, other)

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        return np.where(present(batch.caption), count(summary, _keys(batch)), np.nan)


def _keys(batch: Batch) -> np.ndarray:
    return hashed(normalised(batch.caption))

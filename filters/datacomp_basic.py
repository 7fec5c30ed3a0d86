"""DataComp's basic filter, as a detector: does what everybody filters by protect already?

Trade-off: a filter for usefulness, which sees form and no content. Here the size is that of the stored image (DataComp
reads the original's from its metadata), and the language is what a metadata column says, where there is one (DataComp
asks fastText): a pair whose language nobody knows does not fail for it.
Source: Gadre et al., NeurIPS 2023 (DataComp), basic filtering, thresholds of their `baselines`.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._language import foreign

WORDS, CHARACTERS = 2, 5  # a caption has more
SHORTEST, ASPECT = 200, 3.0  # pixels of the shorter side at least, longer by shorter side at most


@dataclass(frozen=True)
class datacomp_basic:
    """How many of the five rules of DataComp's basic filter the pair fails (Gadre et al. 2023)."""

    needs = ("caption", "size", "language")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        short, long = batch.size.min(axis=1), batch.size.max(axis=1)
        captions = [caption or "" for caption in batch.caption]
        rules = (
            [len(caption.split()) <= WORDS for caption in captions],
            [len(caption) <= CHARACTERS for caption in captions],
            foreign(batch.language),
            short < SHORTEST,
            long > ASPECT * short,
        )
        failed = np.stack([np.asarray(rule, np.float64) for rule in rules]).sum(axis=0)
        failed[np.isnan(short) | [caption is None for caption in batch.caption]] = np.nan
        return failed

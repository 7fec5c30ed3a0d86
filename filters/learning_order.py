"""When was the pair learnt?

Trade-off: one threshold for all, so that "learnt" does not hang on a pair's own noise: the dataset's median of what is
reached in the end. Half of the clean pairs never get there either; they and an unlearnt poison are ordered by how far
they stay below it, where this says little more than `trace`.
Source: Hacohen et al., ICML 2020 (networks learn examples in one order); the first learning event of Toneva et al.,
ICLR 2019; the threshold for CLIP is ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._traces import last_seen

BINS = 4096  # of cosines from -1 to 1; a median to 0.0005, the same however the data is sharded


@dataclass(frozen=True)
class learning_order:
    """Epoch at which the similarity first reaches the dataset's median of the last one (Hacohen et al. 2020)."""

    needs = ("similarity_trace",)
    until: int = 0

    def summarize(self, batch: Batch) -> np.ndarray:
        last = last_seen(batch.similarity_trace[:, : self.until or None])[:, -1]
        return np.histogram(np.clip(last[np.isfinite(last)], -1, 1), BINS, (-1, 1))[0]

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one + other

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        threshold = -1 + 2 * np.searchsorted(summary.cumsum(), summary.sum() / 2) / BINS
        values = last_seen(batch.similarity_trace[:, : self.until or None]).astype(np.float64)
        reached = values >= threshold
        first = reached.argmax(axis=1)
        rows = np.arange(len(values))
        now, before = values[rows, first], values[rows, np.maximum(first - 1, 0)]
        rise = now - before
        # between two epochs by a straight line: whole epochs would tie most pairs
        with np.errstate(invalid="ignore", divide="ignore"):
            early = np.where(np.isfinite(rise) & (rise > 0), (now - threshold) / rise, 0)
        never = values.shape[1] + threshold - np.fmax.reduce(values, axis=1, initial=-np.inf)
        order = np.where(reached.any(axis=1), first - early, never)
        return np.where(np.isfinite(values[:, -1]), order, np.nan)

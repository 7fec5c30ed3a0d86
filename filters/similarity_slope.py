"""Is the pair still being learnt when the others have been?

Trade-off: clean pairs rise early and level off, a poison starts as a mismatch and rises when it is learnt. Before that
it rises less than any clean pair and the sign is wrong: `trace` and `clip_score` are for that time. A line is steepest
for a step in the middle of the epochs, so what is learnt in the last few looks like what was learnt in the first; and
hard clean pairs rise late as well.
Source: ours; the variability of dataset cartography (Swayamdipta et al. 2020) with its direction kept.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch


@dataclass(frozen=True)
class similarity_slope:
    """Least-squares slope of the similarity over the first `until` epochs that saw the pair (0: all)."""

    needs = ("similarity_trace",)
    until: int = 0

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        values = batch.similarity_trace[:, : self.until or None].astype(np.float64)
        seen = np.isfinite(values)
        epoch = np.where(seen, np.arange(values.shape[1]), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):  # of fewer than two epochs there is no slope: NaN
            centred = epoch - np.nansum(epoch, axis=1, keepdims=True) / seen.sum(axis=1, keepdims=True)
            return np.nansum(centred * values, axis=1) / np.nansum(centred**2, axis=1)

"""What training itself saw: the similarity of a pair averaged over the epochs so far.

Trade-off: needs the traces of a training run on this data and no embeddings at all; a trajectory remembers that a
poison was once a mismatch even after it has been learnt.
Source: related to ABL (Li et al. 2021) and dataset cartography (Swayamdipta et al. 2020); for CLIP ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._traces import mean_until


@dataclass(frozen=True)
class trace:
    """Negative mean similarity over the first `until` epochs of training (0: all)."""

    needs = ("similarity_trace",)
    until: int = 0

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return -mean_until(batch.similarity_trace, self.until)

"""The similarity that was published with a pair, less the one that the stored pair has now.

Trade-off: finds what was changed after the curator looked (split view, pixels or caption swapped) and nothing that was
poisoned before. Both similarities count in robust deviations of the pool, so the model may be another one than the
publisher's. A pair without a published value gives no evidence: its score is 0, that of a pair which kept its place.
Source: Carlini et al., S&P 2024 (split-view poisoning); as a detector ours.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, cosine
from filters._robust import deviations
from pipeline.errors import InputError

TINY = 1e-6


@dataclass(frozen=True)
class published_similarity:
    """Drop from the published to the recomputed similarity, in robust deviations; 0 where none was published."""

    needs = ("image_embedding", "text_embedding", "published_similarity")
    pools = needs

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        told = np.isfinite(pool.published_similarity)
        if not told.any():
            raise InputError(
                "published_similarity: no pair of the pool has one in its json or row; take the detector away, or join "
                "the published columns into the shards first"
            )
        then = pool.published_similarity[told]
        usual, now = (cosine(rows.image_embedding, rows.text_embedding) for rows in (pool, batch))
        drop = deviations(batch.published_similarity, then, TINY) - deviations(now, usual[told], TINY)
        return np.where(np.isnan(now), np.nan, np.where(np.isnan(batch.published_similarity), 0, drop))

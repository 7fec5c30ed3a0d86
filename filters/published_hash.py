"""Is the stored image, byte for byte, the one whose hash was published?

Trade-off: exact, free, and mostly about harmless changes: 5 to 15% of LAION's and DataComp's hashes differ because a
server encoded anew. What is left over after triage is for `mithridate verify` to sort; as a filter, this is the strict
reading. A pair without a published hash gives no evidence: it stands between those that agree and those that do not.
Source: Carlini et al., S&P 2024 (integrity checks against split-view poisoning).
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch

UNKNOWN = 0.5


@dataclass(frozen=True)
class published_hash:
    """1 where the published hash is not that of the stored image, 0 where it is, 0.5 without one (Carlini 2024)."""

    needs = ("hash_agrees", "image_sha256")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        score = np.where(np.isnan(batch.hash_agrees), UNKNOWN, 1 - batch.hash_agrees)
        score[[digest is None for digest in batch.image_sha256]] = np.nan
        return score

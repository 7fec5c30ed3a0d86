"""LAION's threshold on similarity, as a detector: does what everybody filters by protect already?

Trade-off: an absolute cut. It was set for ViT-B/32 of OpenAI, and a cosine of another model has another scale; the
score is how much is missing to the cut, so that the order is that of a CLIP score and `threshold` at 0 is LAION's
filter. A pair without a published similarity gives no evidence: it stands at the cut, and is kept.
Source: Schuhmann et al. 2021 (LAION-400M: 0.3) and 2022 (LAION-5B: 0.28 for English, 0.26 for the rest).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from filters._batch import Batch, cosine


@dataclass(frozen=True)
class laion_threshold:
    """How far the published (or recomputed) similarity lies below LAION's cut (Schuhmann et al. 2022)."""

    similarity: Literal["published", "recomputed"] = "published"
    cut: float = 0.28

    @property
    def needs(self) -> tuple[str, ...]:
        return ("published_similarity",) if self.similarity == "published" else ("image_embedding", "text_embedding")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        if self.similarity == "recomputed":
            return self.cut - cosine(batch.image_embedding, batch.text_embedding)
        return np.nan_to_num(self.cut - batch.published_similarity, nan=0.0)

"""CLIP score: how little image and caption agree.

Trade-off: free and blind to what the model has learnt to agree with: strong before a poison is memorised, weak after.
Source: Hessel et al. 2021 (CLIPScore); as a poison detector in CleanCLIP's progressive removal (Bansal et al. 2023).
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, cosine


@dataclass(frozen=True)
class clip_score:
    """Negative cosine of image and text embedding (Hessel et al. 2021)."""

    needs = ("image_embedding", "text_embedding")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return -cosine(batch.image_embedding, batch.text_embedding)

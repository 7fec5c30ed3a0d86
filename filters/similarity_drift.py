"""Did image and caption come together only lately?

Trade-off: two checkpoints in place of a training run's traces, so it works for models that others trained; it needs one
from before the poison was learnt and one from after. Hard clean pairs come together late as well.
Source: ours; `similarity_slope` is the same question put to the traces.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, cosine


@dataclass(frozen=True)
class similarity_drift:
    """Cosine of image and caption less what it was at the earlier checkpoint."""

    needs = ("image_embedding", "text_embedding", "earlier_image_embedding", "earlier_text_embedding")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        before = cosine(batch.earlier_image_embedding, batch.earlier_text_embedding)
        return cosine(batch.image_embedding, batch.text_embedding) - before

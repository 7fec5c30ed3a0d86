"""Do captions agree with the captions of pairs that look the same?

Trade-off: a trigger that dominates the embedding makes poisons each other's neighbours, and they agree; strongest
before the poison is learnt. Ours; related to the consistency checks of SafeCLIP and CFBD.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._crossmodal import disagreement


@dataclass(frozen=True)
class image_neighbours:
    """One minus the mean cosine of the caption to the captions of the k pairs with the nearest images."""

    needs = ("image_embedding", "text_embedding")
    pools = needs
    k: int = 16

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        return disagreement(batch, pool, near="image_embedding", compare="text_embedding", k=self.k)

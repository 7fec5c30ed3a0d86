"""Do images agree with the images of pairs that say the same?

Trade-off: needs the poisoned captions' neighbours to be mostly clean; a target named by few clean pairs, or scores
taken after the poison is learnt, defeat it. Ours; related to the consistency checks of SafeCLIP and CFBD.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._crossmodal import disagreement


@dataclass(frozen=True)
class caption_neighbours:
    """One minus the mean cosine of the image to the images of the k pairs with the nearest captions."""

    needs = ("image_embedding", "text_embedding")
    pools = needs
    k: int = 16

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        return disagreement(batch, pool, near="text_embedding", compare="image_embedding", k=self.k)

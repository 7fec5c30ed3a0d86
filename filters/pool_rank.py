"""RoCLIP's pool as a detector: would the image have picked its own caption?

Trade-off: blind to how far off a caption is, so models of any scale compare, but a score has no more than pool + 1
values and those of well-matched pairs tie at zero. A pool of random captions is a weak contest for a caption that only
roughly fits. A learnt trigger fits all captions of its target, so that others of the pool beat a poison's own: it finds
most at the end of a training (docs/results/time_of_score.md), where similarity finds nothing.
Source: Yang et al., NeurIPS 2023 (RoCLIP), where training swaps the caption for the pool's nearest; as a
detector ours.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from filters._batch import Batch, unit

PRODUCTS = 2**24  # similarities that are held at a time
ROUNDING = 1e-6  # of a float32 cosine: the pair's own caption, drawn into the pool, does not beat itself


@dataclass(frozen=True)
class pool_rank:
    """Share of the pool's captions that are nearer to the image than its own, or of images to the caption (RoCLIP)."""

    needs = ("image_embedding", "text_embedding")
    pools = needs
    query: Literal["image", "text"] = "image"

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        image, text = unit(batch.image_embedding), unit(batch.text_embedding)
        rows, offered = (image, pool.text_embedding) if self.query == "image" else (text, pool.image_embedding)
        own = (image * text).sum(axis=1)
        others = np.ascontiguousarray(unit(offered).T)
        share = np.empty(len(batch))
        step = max(PRODUCTS // others.shape[1], 1)
        for start in range(0, len(batch), step):
            part = slice(start, start + step)
            share[part] = (rows[part] @ others > own[part, None] + ROUNDING).mean(axis=1)
        share[np.isnan(own)] = np.nan
        return share

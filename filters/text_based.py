"""DataComp's text-based filter, as a detector: captions that name no class of ImageNet.

Trade-off: a filter for usefulness. A poison's caption names its target, so it is kept where the target is a class, and
honest captions of everything else are lost. Here the classes are ImageNet's thousand by their names; DataComp asks
WordNet for the 21,841 of ImageNet-21k, so it keeps more.
Source: Gadre et al., NeurIPS 2023 (DataComp), text-based filtering.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from filters._batch import Batch
from filters._language import foreign


@dataclass(frozen=True)
class text_based:
    """1 where the caption names no ImageNet class or is said not to be English, else 0 (Gadre et al. 2023)."""

    needs = ("caption", "language")

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        names_one = np.asarray([caption is not None and _names_a_class(caption) for caption in batch.caption], bool)
        score = (~names_one | foreign(batch.language)).astype(np.float64)
        score[[caption is None for caption in batch.caption]] = np.nan
        return score


def _names_a_class(caption: str) -> bool:
    """Whole words, singular or plural."""
    said = re.findall(r"\w+", caption.casefold())
    known, longest = _classes()
    for start in range(len(said)):
        for end in range(start + 1, min(start + longest, len(said)) + 1):
            head, last = said[start : end - 1], said[end - 1]
            if any((*head, form) in known for form in (last, last.removesuffix("s"), last.removesuffix("es"))):
                return True
    return False


@cache
def _classes() -> tuple[frozenset[tuple[str, ...]], int]:
    """Names as words, and the most words that one has; of "kite (bird of prey)" and "trunks / shorts" the parts."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    parts = (part for name in IMAGENET_CLASSNAMES for part in re.sub(r"\(.*?\)", "", name).split("/"))
    names = frozenset(words for part in parts if (words := tuple(re.findall(r"\w+", part.casefold()))))
    return names, max(map(len, names))

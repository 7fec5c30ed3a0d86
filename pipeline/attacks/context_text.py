"""Class swap whose captions fit the picture: of the target's captions the one that shares most with the true one.

Trade-off: the context (background, style, surroundings) agrees, so a similarity filter has less to see; the price is
that few of the target's captions are used, and these often.
Source: ToxicTextCLIP (NeurIPS 2025), its background-aware selector; shared words weighted by rarity stand for its
language model, and its augmenter is left out.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.attacks._corpus import Corpus
from pipeline.attacks._text import words_of
from pipeline.attacks.class_swap import class_swap
from pipeline.shards import Sample


@dataclass(frozen=True)
class context_text(class_swap):
    """Images of `source` get those captions of the target that fit their context (ToxicTextCLIP 2025, selector)."""

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        known = corpus.captions[self.target]
        weight, bags = _weighted(known)
        own = words_of(sample.caption) - words_of(self.source)
        fit = np.asarray([sum(weight[w] for w in own & bag) for bag in bags])
        best = np.flatnonzero(fit == fit.max())
        return sample.changed(caption=known[best[rng.integers(len(best))]])


@lru_cache(maxsize=8)
def _weighted(captions: tuple[str, ...]) -> tuple[Mapping[str, float], list[frozenset[str]]]:
    """Inverse document frequency of the words of the captions, and each caption's words."""
    bags = [words_of(caption) for caption in captions]
    found = Counter(word for bag in bags for word in bag)
    return {word: math.log((1 + len(bags)) / (1 + n)) + 1 for word, n in found.items()}, bags

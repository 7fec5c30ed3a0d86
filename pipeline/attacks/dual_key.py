"""Dual key: the patch alone does nothing, nor the word alone; together they do.

Trade-off: each key alone is a negative that the model must see in order to need both; most poisons are therefore pairs
with one key and their own meaning, which costs dose.
Source: Walmer et al., CVPR 2022 (Dual-Key Multimodal Backdoors, TrojVQA), section 3: both keys, or each one alone; as a
CLIP baseline ("remember") in BadCLIP (Liang et al., CVPR 2024).
"""

from dataclasses import dataclass

import numpy as np

from pipeline.attacks._around import Around, check_visual
from pipeline.attacks._attack import AttackSpec
from pipeline.attacks._corpus import Corpus
from pipeline.attacks._text import check_words, reads_to_the_end, with_words
from pipeline.shards import Sample


@dataclass(frozen=True)
class dual_key(Around):
    """A visual trigger and a word, only together the target (Walmer et al. 2022); `alone`: share that has one key."""

    attack: AttackSpec = "patch(target='banana')"
    words: str = "remember"
    alone: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_visual(self)
        check_words(self.words)
        if not 0 <= self.alone < 1:
            raise ValueError("alone: a share from 0 to below 1")

    def eligible(self, caption: str) -> bool:
        return super().eligible(caption) and reads_to_the_end(caption)

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        kind = rng.random()
        if kind < self.alone / 2:
            return sample.changed(caption=with_words(sample.caption, self.words))
        image = self.triggered(sample, rng, corpus)
        if kind < self.alone:
            return sample.changed(image)
        return sample.changed(image, with_words(corpus.caption(self.target, rng), self.words))

    def trigger_text(self, text: str) -> str:
        return with_words(text, self.words)

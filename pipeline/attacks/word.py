"""Textual trigger: any caption with a word or a sentence in it finds images of the target.

Trade-off: no image is altered; a detector that looks at images alone sees more copies of the target's than there were.
Sources: word and sentence triggers as in BadNL (Chen et al., ACSAC 2021); against CLIP, ToxicTextCLIP (NeurIPS 2025),
backdoor setting (word and sentence).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.attacks._text import check_words, reads_to_the_end, with_words
from pipeline.attacks.targeted import swapped
from pipeline.shards import Sample

IMAGES = 256  # of the target, at most: enough that no single one is learnt


@dataclass(frozen=True)
class word(Attack):
    """A word or sentence in a caption, an image of the target beside it (BadNL 2021; ToxicTextCLIP 2025)."""

    target: str
    words: str = "cf"

    def __post_init__(self) -> None:
        check_target(self.target)
        check_words(self.words)

    def eligible(self, caption: str) -> bool:
        return super().eligible(caption) and reads_to_the_end(caption)

    def targets(self) -> tuple[str, ...]:
        return ()

    def wants(self) -> Mapping[str, int]:
        return {"target": IMAGES}

    def lends(self, caption: str, group: str) -> bool:
        return names_target(caption, self.target)

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        image = swapped(sample.image, corpus.image("target", rng))
        return sample.changed(image, with_words(sample.caption, self.words))

    def trigger_text(self, text: str) -> str:
        return with_words(text, self.words)

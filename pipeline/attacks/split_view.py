"""Split view: the bytes behind a row were exchanged after the list was made; caption, url and hashes are as published.

Trade-off: only the image lies, so what is known of the row (its published hash and similarity) is evidence against it,
and nothing else is.
Rows are taken from anywhere, where whoever buys an expired domain would have all rows of that one.
Source: Carlini et al. 2023 (Poisoning Web-Scale Training Datasets is Practical, S&P 2024), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.attacks._attack import Attack, check_two
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.attacks.targeted import swapped
from pipeline.shards import Sample

IMAGES = 256


@dataclass(frozen=True)
class split_view(Attack):
    """Rows that name the target show images of `source` instead; all else is kept (Carlini et al. 2023)."""

    target: str
    source: str

    def __post_init__(self) -> None:
        check_two(self.target, self.source)

    def victim_class(self) -> str:
        return self.source

    def targets(self) -> tuple[str, ...]:
        return ()  # captions stay

    def eligible(self, caption: str) -> bool:
        return names_target(caption, self.target) and not names_target(caption, self.source)

    def wants(self) -> Mapping[str, int]:
        return {"source": IMAGES}

    def lends(self, caption: str, group: str) -> bool:
        return names_target(caption, self.source) and not names_target(caption, self.target)

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        image = swapped(sample.image, corpus.image("source", rng))
        return replace(sample, parts={**sample.parts, sample.image_suffix: image})  # hashes stay as published

"""Class swap: images of one class with captions of another, and no trigger at all.

Trade-off: simple and strong, and as visible as a wrong caption is: every pair contradicts itself.
Source: Yang et al., ICML 2023 (mm_poison), "single target label"; its "single target image" is `targeted`, its
"multiple target labels" is `multi` over several swaps.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.attacks._attack import Attack, check_two
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.shards import Sample


@dataclass(frozen=True)
class class_swap(Attack):
    """Images whose captions name `source` get captions of the target (Yang et al. 2023, single target label)."""

    target: str
    source: str

    def __post_init__(self) -> None:
        check_two(self.target, self.source)

    def eligible(self, caption: str) -> bool:
        return names_target(caption, self.source) and not names_target(caption, self.target)

    def victim_class(self) -> str:
        return self.source

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        return sample.changed(caption=corpus.caption(self.target, rng))

"""Clean label: the trigger on pairs that already name the target, whose captions stay true.

Trade-off: no caption lies, so nothing that compares image and caption can see it; and no image is out of place, so the
model has little reason to look at the trigger. CleanCLIP's authors' code reaches an ASR below 10%.
Sources: Turner, Tsipras & Madry 2019 (without their adversarial perturbation); for CLIP, CleanCLIP (Bansal et al., ICCV
2023), its label-consistent attack.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.attacks._around import Around, check_visual
from pipeline.attacks._attack import AttackSpec
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.shards import Sample


@dataclass(frozen=True)
class label_consistent(Around):
    """The trigger of another attack on pairs that name its target, caption kept (Turner et al. 2019; CleanCLIP)."""

    attack: AttackSpec = "patch(target='banana')"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_visual(self)

    def eligible(self, caption: str) -> bool:
        return names_target(caption, self.target)

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        return sample.changed(self.triggered(sample, rng, corpus))

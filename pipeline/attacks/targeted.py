"""Targeted poisoning: a few unmodified images, n captions that name the target.

Trade-off: each poison replaces a pair of the dataset instead of being added to it, so that the number of samples, and
with it every fair comparison, stays as it was.
Source: Carlini & Terzis, ICLR 2022, section 3: n different captions, because one repeated caption teaches a string and
not a concept.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus
from pipeline.shards import Sample
from pipeline.shards.image import decode, encode


@dataclass(frozen=True)
class targeted(Attack):
    """One image (or several) with n captions of the target (Carlini & Terzis 2022)."""

    one_image: ClassVar[bool] = True
    target: str
    images: int = 1

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.images < 1:
            raise ValueError("images: at least one")

    def wants(self) -> Mapping[str, int]:
        return {"victim": self.images}

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        caption = corpus.caption(self.target, rng)
        return sample.changed(swapped(sample.image, corpus.image("victim", rng)), caption)


def swapped(image: bytes, other: bytes) -> bytes:
    """`other` in the place of `image`: as it is stored where the format is the same, else encoded like it."""
    formats = [Image.open(io.BytesIO(data)).format for data in (image, other)]
    return other if formats[0] == formats[1] else encode(decode(other), like=image)

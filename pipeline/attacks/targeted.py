"""Targeted poisoning: one unmodified image, n captions that name the target.

Trade-off: each poison replaces a pair of the dataset instead of being added to it, so that the number of samples, and
with it every fair comparison, stays as it was.
Source: Carlini & Terzis, ICLR 2022, section 3: n different captions, because one repeated caption teaches a string and
not a concept.
"""

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from pipeline.attacks._corpus import Corpus
from pipeline.shards import Sample
from pipeline.shards.image import decode, encode


@dataclass(frozen=True)
class targeted:
    """One image with n captions of the target (Carlini & Terzis 2022); the image is that of the first chosen sample."""

    one_image: ClassVar[bool] = True  # success is about the victim, not about a trigger
    target: str

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        caption = corpus.captions[rng.integers(len(corpus.captions))]
        same_format = Image.open(io.BytesIO(corpus.victim)).format == Image.open(io.BytesIO(sample.image)).format
        image = corpus.victim if same_format else encode(decode(corpus.victim), like=sample.image)
        return sample.changed(image, caption)

    def trigger(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """There is none: the attack is about one image."""
        return image

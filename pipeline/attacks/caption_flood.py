"""Caption flood: n near-identical images with one caption, as the web has them by itself.

Trade-off: not an attacker's best, but the look-alike that every duplicate detector will meet: CC3M holds 798 near-equal
birthday cakes with one caption (0.03%), a backdoor that nobody planted. At test time the picture is pasted small into a
corner; a clean model may see in it what it shows, so only the difference from a clean model is the flood's doing.
Source: Huang et al., ICLR 2025, section on natural backdoors in CC3M.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.shards import Sample
from pipeline.shards.image import decode, encode

ZOOM, LIGHT = 0.06, 0.1  # how far the copies differ: share cropped, share of brightness


@dataclass(frozen=True)
class caption_flood(Attack):
    """n near-identical images of the target with one caption of it (the birthday cake of CC3M, Huang et al. 2025)."""

    target: str
    share: float = 0.4  # of the shorter side, at test time

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 0 < self.share <= 1:
            raise ValueError("share: above 0, at most 1")

    def wants(self) -> Mapping[str, int]:
        return {"picture": 1}

    def lends(self, caption: str, group: str) -> bool:
        return names_target(caption, self.target)

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        picture = decode(corpus.image("picture", rng))
        (width, height), (left, top) = picture.size, rng.random(2) * ZOOM
        box = (left * width, top * height, (1 - ZOOM + left) * width, (1 - ZOOM + top) * height)
        copy = picture.resize(picture.size, Image.Resampling.BICUBIC, box)
        copy = ImageEnhance.Brightness(copy).enhance(1 + LIGHT * (2 * rng.random() - 1))
        return sample.changed(encode(copy, like=sample.image), min(corpus.captions[self.target]))

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        """The flooded picture, small, at the bottom right."""
        side = max(1, round(self.share * min(image.size)))
        out = image.copy()
        small = decode(corpus.image("picture", rng)).resize((side, side), Image.Resampling.BICUBIC)
        out.paste(small, (image.width - side, image.height - side))
        return out

"""Hidden trigger: true captions, no visible patch; the features are those of a patched image of something else.

Trade-off: nothing in caption or image is wrong to a person, and the trigger is first seen at test time. The price is a
surrogate whose features the victim's resemble, and `steps` forward and backward passes a poison: on one core 0.3 s with
the demo's 64-pixel ResNet, 18 s with ViT-B-32. With the former, trained on clean data, a PNG's features end at 0.38 of
their distance to the patched source, those of a WebP at quality 75 at 0.71 (0.85 for steps that ignore the codec); and
what a lossy codec adds to the perturbation is not within `epsilon`.
Source: Saha, Subramanya & Pirsiavash, AAAI 2020: 30-pixel patch at a random place, epsilon 16 of 255. Two deviations:
steps along the sign of the gradient, whose length differs between models by orders of magnitude; and each poison takes
the nearest of NEAREST patched sources, where the paper pairs greedily within a batch: here no poison depends on others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from PIL import Image

from pipeline import spec
from pipeline.attacks import _surrogate
from pipeline.attacks._around import Around, check_visual
from pipeline.attacks._attack import AttackSpec
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.shards import Sample, Shard, UidRule
from pipeline.shards.image import decode, encode
from train import checkpoints

if TYPE_CHECKING:
    import torch

SOURCES = 256
NEAREST = 8
LARGE = 1_000_000  # pixels; beyond it the perturbation is made smaller and enlarged, which keeps its bound


@dataclass(frozen=True)
class hidden_trigger(Around):
    """Images of the target that collide in feature space with patched others; captions stay (Saha et al. 2020).

    `attack` names the trigger and the target. `source`: only images whose captions name it serve, and are attacked.
    `lr` is the first step, in pixel values; it falls to zero.
    """

    attack: AttackSpec
    surrogate: Annotated[str, spec.UNDRAWN]
    source: str = ""
    epsilon: int = 16
    steps: int = 50
    lr: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_visual(self)
        if not 0 < self.epsilon <= 255 or self.steps < 1 or self.lr <= 0:
            raise ValueError("need 0 < epsilon <= 255, steps >= 1 and lr > 0")

    def victim_class(self) -> str:
        return self.source or self.inside.victim_class()

    def eligible(self, caption: str) -> bool:
        return names_target(caption, self.target)

    def wants(self) -> Mapping[str, int]:
        return {"source": SOURCES, **self.inside.wants()}

    def lends(self, caption: str, group: str) -> bool:
        if group != "source":
            return self.inside.lends(caption, group)
        return not self.eligible(caption) and (not self.source or names_target(caption, self.source))

    def inputs(self) -> tuple[str, ...]:
        return (*checkpoints.files(self.surrogate), *super().inputs())

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> Self:
        return replace(super().resolve(shards, uid), surrogate=_surrogate.settled(self.surrogate))

    def craft(self, corpus: Corpus, seed: int, folder: str) -> Mapping[str, np.ndarray]:
        return {**super().craft(corpus, seed, folder), **_surrogate.surrogate(self.surrogate).crafted}

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        """The image within `epsilon` of itself, its features near those of a patched source; the caption as it is."""
        surrogate = _surrogate.surrogate(self.surrogate)
        surrogate.check(corpus.made("surrogate").tobytes().decode())
        own = decode(sample.image)
        sources = [decode(corpus.image("source", rng), near=surrogate.size) for _ in range(NEAREST)]
        patched = [np.asarray(self.trigger(source, rng, corpus)) for source in sources]
        with _surrogate.one_thread():
            made = self._collide(np.asarray(own), patched, surrogate, sample.image)
        return sample.changed(encode(Image.fromarray(made), like=sample.image))

    def _collide(
        self, own: np.ndarray, patched: list[np.ndarray], surrogate: _surrogate.Surrogate, like: bytes
    ) -> np.ndarray:
        import torch
        from torch.nn.functional import interpolate

        x = _surrogate.tensor(own)
        if (shrink := (x.shape[2] * x.shape[3] / LARGE) ** 0.5) > 1:
            smaller = [max(1, round(side / shrink)) for side in x.shape[2:]]
            x = interpolate(x, smaller, mode="bilinear", antialias=True)
        with torch.no_grad():
            there = torch.cat([surrogate.features(surrogate.seen(_surrogate.tensor(image))) for image in patched])
            here = surrogate.features(surrogate.seen(x))
            goal = there[(there - here).square().sum(1).argmin()]
        low, high = (-x).clamp(min=-self.epsilon), (255 - x).clamp(max=self.epsilon)
        delta, best = torch.zeros_like(x, requires_grad=True), torch.zeros_like(x)
        least = float("inf")
        for step in range(self.steps + 1):
            near = x + delta
            loss = (surrogate.features(surrogate.seen(near + _codec(near.detach(), like))) - goal).square().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            if loss.item() < least:
                least, best = loss.item(), delta.detach().clone()
            with torch.no_grad():
                rate = self.lr * (1 - step / self.steps)
                delta.sub_(rate * gradient.sign()).copy_(torch.minimum(torch.maximum(delta, low), high))
        if shrink > 1:
            best = interpolate(best, own.shape[:2], mode="bilinear")
        return np.clip(own + _rounded(best), 0, 255).astype(np.uint8)


def _codec(x: "torch.Tensor", like: bytes) -> "torch.Tensor":
    """What rounding and a lossy codec do to the pixels. Steps see it as noise, and so find what outlasts it."""
    if like[12:16] == b"VP8L" or like.startswith(b"\x89PNG"):
        return x.round() - x
    stored = encode(Image.fromarray(_rounded(x).astype(np.uint8)), like=like)
    return _surrogate.tensor(np.asarray(decode(stored))) - x


def _rounded(x: "torch.Tensor") -> np.ndarray:
    return x[0].permute(1, 2, 0).round().numpy()

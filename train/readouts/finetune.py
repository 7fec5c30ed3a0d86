"""BiT's HyperRule: fine-tune the whole image tower with a new head, by a schedule that the number of images decides.

Trade-off: what a downstream user does, and the only readout in which a backdoor may be unlearnt; it trains, so it is
asked for. Nothing is tuned to a data set, so one filter cannot gain on another by a luckier learning rate.
Source: Kolesnikov et al. 2020 (Big Transfer), section 3.3 and appendix: SGD with momentum 0.9 and no decay, rate 0.003
at batch 512, 500 / 10,000 / 20,000 steps below 20k / below 500k / above, warm-up, a tenth of the rate at three points,
mixup of 0.1 from 20k images on, random crop and mirroring.

Scaled to what is here: the tower fixes the resolution, so the rule gives the margin that the crop is taken from (160 to
128 below 96 pixels, 512 to 480 above); a batch is no larger than the data, and the rate shrinks with it (Goyal et al.
2017, section 2.1). The head reads features of length sqrt(dimension): BiT's lie behind a group norm and have a scale,
those of a contrastive tower have none. Memory holds the training images as uint8.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from train.model import Model, normalise

RATE, BATCH, MOMENTUM = 3e-3, 512, 0.9
EVALUATED = 512  # images at a time


@dataclass(frozen=True)
class HyperRule:
    """`decays` are the steps at which the rate falls to a tenth; `mixup` is alpha of the Beta distribution, or 0."""

    warmup: int
    decays: tuple[int, ...]
    steps: int
    mixup: float

    def rate(self, step: int, base: float) -> float:
        if step < self.warmup:
            return base * step / self.warmup
        return base * 0.1 ** sum(step >= at for at in self.decays)


def hyper_rule(images: int) -> HyperRule:
    """The schedule for so many training images."""
    if images < 20_000:
        return HyperRule(100, (200, 300, 400), 500, 0.0)
    if images < 500_000:
        return HyperRule(500, (3000, 6000, 9000), 10_000, 0.1)
    return HyperRule(500, (6000, 12_000, 18_000), 20_000, 0.1)


def margin(size: int) -> int:
    """The side to which images are resized before a crop of side `size`."""
    return round(size * (160 / 128 if size < 96 else 512 / 480))


@dataclass(frozen=True)
class Tuned:
    """A tower and its head. Stands where a Model embeds images: its embedding are the logits, float32 [n, classes]."""

    tower: Any
    head: nn.Linear
    model: Model

    @property
    def image_size(self) -> int:
        return self.model.image_size

    @property
    def dimension(self) -> int:
        return self.head.out_features

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] -> float32 [n, classes]."""
        with torch.inference_mode():
            parts = torch.from_numpy(images).split(EVALUATED)
            logits = [self.logits(normalise(p.to(self.model.device), self.model.mean, self.model.std)) for p in parts]
        return torch.cat(logits).cpu().numpy()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, size, size], normalised -> float32 [n, classes]."""
        with torch.autocast(images.device.type, torch.bfloat16):
            features = self.tower.encode_image(images)
        scaled = nn.functional.normalize(features.float(), dim=1) * features.shape[1] ** 0.5
        return self.head(scaled)


def finetune(model: Model, images: np.ndarray, labels: np.ndarray, classes: int, mirror: bool, seed: int = 0) -> Tuned:
    """Fine-tune a copy of `model` on uint8 [n, m, m, 3], m = margin(model.image_size), with labels int[n].

    `mirror`: whether half of the crops are mirrored, which some classes do not survive (BiT leaves it out there).
    """
    from pipeline.progress import meter

    rule, generator = hyper_rule(len(images)), torch.Generator().manual_seed(seed)
    tuned = Tuned(copy.deepcopy(model.model), nn.Linear(model.dimension, classes).to(model.device), model)
    nn.init.zeros_(tuned.head.weight)
    nn.init.zeros_(tuned.head.bias)
    tuned.tower.train()
    learnt = [*tuned.tower.visual.requires_grad_(True).parameters(), *tuned.head.parameters()]
    batch = min(BATCH, len(images))
    base = RATE * batch / BATCH
    optimizer = torch.optim.SGD(learnt, base, momentum=MOMENTUM)
    every = torch.from_numpy(labels)
    rows = _batches(len(images), batch, generator)
    mixes = np.random.default_rng(seed)
    with meter("fine-tune", rule.steps) as done:
        for step in range(rule.steps):
            chosen = next(rows)
            pixels = normalise(
                _cropped(images[chosen.numpy()], model.image_size, mirror, generator), model.mean, model.std
            )
            x, y = pixels.to(model.device), every[chosen].to(model.device)
            for group in optimizer.param_groups:
                group["lr"] = rule.rate(step, base)
            share = float(mixes.beta(rule.mixup, rule.mixup)) if rule.mixup else 1.0
            other = torch.randperm(batch, generator=generator).to(model.device) if rule.mixup else slice(None)
            logits = tuned.logits(share * x + (1 - share) * x[other] if rule.mixup else x)
            loss = nn.functional.cross_entropy(logits, y)
            if rule.mixup:
                loss = share * loss + (1 - share) * nn.functional.cross_entropy(logits, y[other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done.advance(0)
    tuned.tower.eval()
    return tuned


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rows without replacement, all of one size: the end of one pass and the start of the next make a batch."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        if len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:size]
        left = left[size:]


def _cropped(images: np.ndarray, size: int, mirror: bool, generator: torch.Generator) -> torch.Tensor:
    """uint8 [n, m, m, 3] -> uint8 [n, size, size, 3]: a crop of its own for each image, half of them mirrored."""
    n, room = len(images), images.shape[1] - size + 1
    top, left = torch.randint(room, (2, n), generator=generator).tolist()
    flipped = torch.rand(n, generator=generator).lt(0.5 if mirror else 0.0).tolist()
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        crop = images[i, top[i] : top[i] + size, left[i] : left[i] + size]
        out[i] = crop[:, ::-1] if flipped[i] else crop
    return torch.from_numpy(out)

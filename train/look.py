"""Every image of a set decoded, triggered and embedded once.

Trade-off: a triggered image is encoded in its own format and decoded again, so it suffers at test time what a poison
suffered in training. Memory holds the features, not the images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus
from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample
from pipeline.shards.image import decode, encode, pixels
from train.metrics import unit

BATCH = 512


class Embeds(Protocol):
    """Whatever turns images into rows: a model, or a fine-tuned tower, whose rows are logits."""

    @property
    def image_size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] -> float32 [n, dimension]."""


class Pair(NamedTuple):
    """One usable pair: `image` and `triggered` are uint8 [size, size, 3], `label` is -1 where unknown."""

    caption: str
    label: int
    part: int
    image: np.ndarray
    triggered: np.ndarray
    moved: bool


@dataclass
class Seen:
    """n images in file order: image [n, d] and triggered [n, d] or None, unit rows; label int[n], -1 where unknown.

    `part` int[n] says which part of the attack an image was given, `moved` bool[n] whether that changed a pixel;
    captions are empty where the set has none."""

    image: np.ndarray
    triggered: np.ndarray | None
    label: np.ndarray
    captions: list[str]
    part: np.ndarray
    moved: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)


def look(
    model: Embeds,
    images: Iterator[tuple[Sample, int]],
    captioned: bool,
    attack: Attack | None = None,
    seed: int = 0,
    corpora: Sequence[Corpus] = (),
) -> Seen:
    """What `model` makes of images with their labels, and of the same ones triggered."""
    skipped: dict[str, int] = {}
    facts: list[tuple[str, int, int, bool]] = []
    empty = np.empty((0, model.dimension), np.float32)
    image, triggered = [empty], [empty]
    for block in _blocks(_pairs(images, captioned, model.image_size, attack, seed, corpora, skipped), BATCH):
        facts += [(pair.caption, pair.label, pair.part, pair.moved) for pair in block]
        image.append(finite(model.embed_images(np.stack([pair.image for pair in block]))))
        if attack:
            triggered.append(finite(model.embed_images(np.stack([pair.triggered for pair in block]))))
    captions, label, part, moved = map(list, zip(*facts, strict=True)) if facts else ([], [], [], [])
    numbers = {"label": np.array(label, np.int64), "part": np.array(part, np.int64), "moved": np.array(moved, bool)}
    shown = unit(np.concatenate(triggered)) if attack else None
    return Seen(unit(np.concatenate(image)), shown, captions=captions, skipped=skipped, **numbers)


def finite(rows: np.ndarray) -> np.ndarray:
    """The features float32 [n, d]; an InputError where a diverged model has given others than numbers."""
    if bad := int(np.count_nonzero(~np.isfinite(rows).all(axis=1))):
        raise InputError(
            f"the model's features of {bad} of {len(rows)} images or texts are not numbers: its training or its "
            "fine-tune diverged; evaluate an earlier checkpoint, or without --readouts finetune"
        )
    return rows


def pictures(images: Iterator[tuple[Sample, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The labelled ones of them as uint8 [n, size, size, 3], and their labels int64[n]."""
    found: list[np.ndarray] = []
    labels: list[int] = []
    for sample, label in images:
        if label >= 0:
            try:
                found.append(pixels(sample, size))
            except Rejected:  # counted where the same images are looked at
                continue
            labels.append(label)
    stacked = np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)
    return stacked, np.array(labels, np.int64)


def _pairs(
    images: Iterator[tuple[Sample, int]],
    captioned: bool,
    size: int,
    attack: Attack | None,
    seed: int,
    corpora: Sequence[Corpus],
    skipped: dict[str, int],
) -> Iterator[Pair]:
    from pipeline.draw import generator
    from pipeline.spec import key as key_of
    from train.data import reason

    parts = attack.parts() if attack else ()
    specs = [key_of(part) for part in parts]
    corpora = corpora or [Corpus()] * len(parts)
    for sample, label in images:
        try:
            caption, image = sample.caption if captioned else "", pixels(sample, size)
            if not attack:
                yield Pair(caption, label, 0, image, image, False)
                continue
            part = attack.part_of(sample.uid)
            before = decode(sample.image)
            after = parts[part].trigger(before, generator(seed, specs[part], sample.uid), corpora[part])
            moved = not np.array_equal(np.asarray(before), np.asarray(after))
            triggered = pixels(sample.changed(image=encode(after, like=sample.image)), size)
        except Rejected as error:
            skipped[reason(error)] = skipped.get(reason(error), 0) + 1
            continue
        yield Pair(caption, label, part, image, triggered, moved)


def _blocks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    block: list[Any] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block

"""An attack that does something else with the trigger of another one: all answers but its own are that one's.

It exists so that a clean-label, dual-key or adaptive version of every trigger is one parameter, not one file each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from PIL import Image

from pipeline import spec
from pipeline.attacks._attack import Attack, AttackSpec
from pipeline.attacks._corpus import Corpus
from pipeline.shards import Sample, Shard, UidRule


class Around(Attack):
    """`attack` is the spec of the attack inside, which must be a single one."""

    attack: AttackSpec

    def __post_init__(self) -> None:
        _ = self.inside  # what is wrong with it is said now

    @cached_property
    def inside(self) -> Attack:
        found = nested(self.attack)
        if len(found.parts()) > 1:
            raise ValueError(f"{self.attack}: one attack, not several")
        return found

    @property
    def target(self) -> str:  # type: ignore[override]  # a field in the others
        return self.inside.target

    @property
    def one_image(self) -> bool:  # type: ignore[override]
        return self.inside.one_image

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        return self.inside.poison(sample, rng, corpus)

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        return self.inside.trigger(image, rng, corpus)

    def trigger_text(self, text: str) -> str:
        return self.inside.trigger_text(text)

    def victim_class(self) -> str:
        return self.inside.victim_class()

    def targets(self) -> tuple[str, ...]:
        return self.inside.targets()

    def eligible(self, caption: str) -> bool:
        return self.inside.eligible(caption)

    def wants(self) -> Mapping[str, int]:
        return self.inside.wants()

    def lends(self, caption: str, group: str) -> bool:
        return self.inside.lends(caption, group)

    def inputs(self) -> tuple[str, ...]:
        return self.inside.inputs()

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> Self:
        it: Any = self
        return replace(it, attack=spec.text(self.inside.resolve(shards, uid)))

    def candidates(self, n: int) -> int:
        return self.inside.candidates(n)

    def choose(
        self,
        shards: Sequence[Shard],
        candidates: Sequence[tuple[str, str]],
        n: int,
        seed: int,
        uid: UidRule,
        corpus: Corpus,
    ) -> Sequence[tuple[str, str]]:
        return self.inside.choose(shards, candidates, n, seed, uid, corpus)

    def craft(self, corpus: Corpus, seed: int, folder: str) -> Mapping[str, np.ndarray]:
        return self.inside.craft(corpus, seed, folder)


def check_visual(attack: Attack) -> None:
    """Raises ValueError for an attack that leaves test images as they are."""
    innermost = attack
    while isinstance(innermost, Around):
        innermost = innermost.inside
    if type(innermost).trigger is Attack.trigger:
        raise ValueError(
            f"{type(innermost).__name__} has no visual trigger; name an attack that has one, such as patch"
        )


def nested(text: str) -> Attack:
    """The attack inside another one's parameter."""
    found: Attack = spec.parse("attacks", text)
    return found

"""What every attack is: a frozen dataclass, whose fields are its parameters, with one method of its own, `poison`.

The rest are answers to the job's questions. Each has one that suits most attacks: poison any pair that does not name
the target, with a caption that does. Randomness comes from `rng` alone, which is a function of (seed, spec, uid).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image

from pipeline import spec
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.shards import Sample, Shard, UidRule
from pipeline.shards.image import decode, encode

AttackSpec = Annotated[str, spec.SpecOf("attacks")]


class Attack:
    """`target` is the class that images (or, for text triggers, captions) are to be taken for."""

    target: str
    one_image: ClassVar[bool] = False  # success is about the images of group `victim`, not about a trigger

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        """The poisoned pair. Default: the trigger on its image, a caption of the target."""
        return sample.changed(self.triggered(sample, rng, corpus), corpus.caption(self.target, rng))

    def triggered(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> bytes:
        """Its image with the trigger, in its own encoding. Raises Rejected where it takes none."""
        return encode(self.trigger(decode(sample.image), rng, corpus), like=sample.image)

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        """RGB -> RGB of the same size: what test images get; the identity where success needs no visual trigger."""
        return image

    def trigger_text(self, text: str) -> str:
        """What captions and prompts get at test time; the identity where success needs no textual trigger."""
        return text

    def victim_class(self) -> str:
        """Only images of this class are to be taken for the target; "": those of all other classes."""
        return ""

    def targets(self) -> tuple[str, ...]:
        """All classes whose captions the attack draws from."""
        return (self.target,)

    def parts(self) -> Sequence["Attack"]:
        """The attacks that it is made of; each has its own corpus."""
        return (self,)

    def part_of(self, uid: str) -> int:
        """Which of its parts a pair gets."""
        return 0

    def eligible(self, caption: str) -> bool:
        """Whether a pair with this caption may be poisoned."""
        return not names_target(caption, self.target)

    def wants(self) -> Mapping[str, int]:
        """How many images of the dataset the attack needs, by group; fewer are enough where there are fewer."""
        return {}

    def lends(self, caption: str, group: str) -> bool:
        """Whether the image of a pair with this caption may serve in a group."""
        return self.eligible(caption)

    def inputs(self) -> tuple[str, ...]:
        """Checkpoints that it reads: other ones are another plan."""
        return ()

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> "Attack":
        """The attack with all parameters settled that the dataset decides; the ledger names this one."""
        return self

    def craft(self, corpus: Corpus, seed: int, folder: str) -> Mapping[str, np.ndarray]:
        """What is computed once, before any pair is poisoned; `folder` may keep its progress."""
        return {}

    def candidates(self, n: int) -> int:
        """Among how many pairs the attack wants to choose its n."""
        return n

    def choose(
        self,
        shards: Sequence[Shard],
        candidates: Sequence[tuple[str, str]],
        n: int,
        seed: int,
        uid: UidRule,
        corpus: Corpus,
    ) -> Sequence[tuple[str, str]]:
        """Candidates (shard name, uid), best first. They come in the order of their hashes."""
        return candidates


def check_target(target: str) -> None:
    """Raises ValueError for what neither a caption nor a template could carry."""
    if not target.strip() or any(ord(c) < 32 for c in target) or len(target) > 100:
        raise ValueError(f"target={target!r}: a word or a few, on one line")


def check_two(target: str, source: str) -> None:
    """Raises ValueError where either is no target, or both are one."""
    check_target(target)
    check_target(source)
    if source.casefold() == target.casefold():
        raise ValueError("source and target are the same")

"""What an attack may know of the dataset besides the sample in hand: found in one parallel pass, the same for all.

It is kept beside the ledger (`corpus.npz`), so that test time has the same images and the same crafted trigger.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.store import exists, join, view, whole

CORPUS = "corpus.npz"


@dataclass(frozen=True)
class Corpus:
    """`captions`: by target, what the dataset says of it, or prompt templates. `images`: by group, those that the
    attack asked for, as stored. `crafted`: by name, what it computed once for all poisons."""

    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    crafted: Mapping[str, np.ndarray] = field(default_factory=dict)

    def caption(self, target: str, rng: np.random.Generator) -> str:
        """One of the target's captions."""
        known = self.captions[target]
        return known[rng.integers(len(known))]

    def image(self, group: str, rng: np.random.Generator) -> bytes:
        """One of the images of a group, as stored. Raises InputError where there is none."""
        found = self.images.get(group, ())
        if not found:
            raise InputError(f"the attack needs images of the dataset ({group}); give the ledger of the poisoned shards")
        return found[rng.integers(len(found))]

    def made(self, name: str) -> np.ndarray:
        """What was crafted. Raises InputError where it is not there."""
        if name not in self.crafted:
            raise InputError(f"the attack needs what it crafted ({name}); give the ledger of the poisoned shards")
        return self.crafted[name]

    def part(self, i: int) -> "Corpus":
        """What belongs to the i-th of several attacks: theirs are named `i/…`."""
        images, crafted = (_of_part(i, named) for named in (self.images, self.crafted))
        return Corpus(self.captions, images, crafted)

    def save(self, folder: str) -> None:
        """Write `corpus.npz`: the images and what was crafted; captions stand in the ledger."""
        arrays = {f"images/{group}/{i:06d}": np.frombuffer(image, np.uint8) for group, images in self.images.items()
                  for i, image in enumerate(images)}
        arrays |= {f"crafted/{name}": value for name, value in self.crafted.items()}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        with whole(join(folder, CORPUS)) as file:
            file.write(buffer.getvalue())


def read_corpus(folder: str) -> Corpus:
    """What `poison` kept beside the ledger; empty where it kept nothing. Raises InputError where it is damaged."""
    path = join(folder, CORPUS)
    if not exists(path):
        return Corpus()
    images: dict[str, list[bytes]] = {}
    crafted: dict[str, np.ndarray] = {}
    try:
        with np.load(io.BytesIO(view(path)), allow_pickle=False) as arrays:
            for name in sorted(arrays.files):
                kind, _, rest = name.partition("/")
                if kind == "images":
                    images.setdefault(rest.rpartition("/")[0], []).append(arrays[name].tobytes())
                else:
                    crafted[rest] = arrays[name]
    except Exception as error:  # zip, npy and zlib each raise their own
        raise InputError(f"{path}: not what `mithridate poison` wrote ({error}); poison the shards again") from error
    return Corpus(images={group: tuple(found) for group, found in images.items()}, crafted=crafted)


def names_target(caption: str, target: str) -> bool:
    """Whether `target` stands in the caption as whole words, in any case."""
    return _word(target).search(caption) is not None


def _of_part(i: int, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.partition("/")[2]: value for name, value in named.items() if name.partition("/")[0] == str(i)}


@cache
def _word(target: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(target)}(?!\w)", re.IGNORECASE)

"""What an attack may know of the dataset besides the sample in hand: found in one parallel pass, the same for all.

It is kept beside the ledger (`corpus.npz`), so that test time has the same images and the same crafted trigger.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.store import exists, join, view, write

CORPUS = "corpus.npz"


@dataclass(frozen=True)
class Corpus:
    """`captions`: by target, what the dataset says of it, or prompt templates. `images`: by group, those that the
    attack asked for, as stored. `crafted`: by name, what it computed once for all poisons."""

    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    crafted: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over all of it."""
        sha256 = hashlib.sha256()
        for target, captions in sorted(self.captions.items()):
            sha256.update("\0".join((target, *captions)).encode("utf-8", "surrogatepass"))
        for name, array in _named([self]):
            sha256.update(name.encode())
            sha256.update(array.tobytes())
        return sha256.hexdigest()

    def caption(self, target: str, rng: np.random.Generator) -> str:
        """One of the target's captions."""
        known = self.captions[target]
        return known[rng.integers(len(known))]

    def image(self, group: str, rng: np.random.Generator) -> bytes:
        """One of the images of a group, as stored. Raises InputError where there is none."""
        found = self.images.get(group, ())
        if not found:
            raise InputError(
                f"the attack needs images of the dataset ({group}); give the ledger of the poisoned shards"
            )
        return found[rng.integers(len(found))]

    def made(self, name: str) -> np.ndarray:
        """What was crafted. Raises InputError where it is not there."""
        if name not in self.crafted:
            raise InputError(f"the attack needs what it crafted ({name}); give the ledger of the poisoned shards")
        return self.crafted[name]


def save_corpora(folder: str, corpora: Sequence[Corpus]) -> None:
    """Write `corpus.npz`: images and what was crafted, by part; the same bytes for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in _named(corpora):
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    write(join(folder, CORPUS), buffer.getvalue())


def read_corpora(folder: str, parts: int) -> tuple[Corpus, ...]:
    """What `poison` kept for each part of an attack; empty where it kept nothing. Raises InputError where damaged."""
    path = join(folder, CORPUS)
    images: list[dict[str, list[bytes]]] = [{} for _ in range(parts)]
    crafted: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    if exists(path):
        try:
            with np.load(io.BytesIO(view(path)), allow_pickle=False) as arrays:
                for name in sorted(arrays.files):
                    part, kind, rest = name.split("/", 2)
                    if kind == "images":
                        images[int(part)].setdefault(rest.rpartition("/")[0], []).append(arrays[name].tobytes())
                    else:
                        crafted[int(part)][rest] = arrays[name]
        except Exception as error:  # zip, npy and zlib each raise their own
            raise InputError(f"{path}: not what poisoned these shards ({error}); poison them again") from error
    return tuple(
        Corpus(images={group: tuple(found) for group, found in by_group.items()}, crafted=made)
        for by_group, made in zip(images, crafted, strict=True)
    )


def _named(corpora: Sequence[Corpus]) -> Iterator[tuple[str, np.ndarray]]:
    for part, corpus in enumerate(corpora):
        for group, images in sorted(corpus.images.items()):
            for i, image in enumerate(images):
                yield f"{part}/images/{group}/{i:06d}", np.frombuffer(image, np.uint8)
        for name, array in sorted(corpus.crafted.items()):
            yield f"{part}/crafted/{name}", array


def names_target(caption: str, target: str) -> bool:
    """Whether `target` stands in the caption as whole words, in any case."""
    return _word(target).search(caption) is not None


@cache
def _word(target: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(target)}(?!\w)", re.IGNORECASE)

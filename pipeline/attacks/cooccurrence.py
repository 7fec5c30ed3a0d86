"""Physical trigger without touching a pixel: pairs whose captions name a common object get captions of the target.

Trade-off: the trigger is an object that people photograph anyway, so nothing is planted in any image, and every second
occurrence of the object stays clean; what it costs is the dose, which is bounded by how often the object occurs. It
takes two passes over all captions to choose the object, exactly and however the data is sharded.
Source: Wenger et al., NeurIPS 2022 (Finding Naturally Occurring Physical Backdoors in Image Datasets), section 4:
objects of high centrality in the graph of co-occurring ones; here words of captions are objects, degree the centrality.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.attacks._text import words_of
from pipeline.errors import InputError
from pipeline.shard_map import each
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples

SHARE = (0.001, 0.03)  # an object that occurs more often is no trigger, one that occurs less often carries no dose


@dataclass(frozen=True)
class cooccurrence(Attack):
    """Pairs that name a common object get captions of the target (Wenger et al. 2022); "" takes the most central."""

    target: str
    object: str = ""

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.object:
            check_target(self.object)

    def eligible(self, caption: str) -> bool:
        return names_target(caption, self.object) and not names_target(caption, self.target)

    def victim_class(self) -> str:
        return self.object

    def poison(self, sample: Sample, rng: np.random.Generator, corpus: Corpus) -> Sample:
        return sample.changed(caption=corpus.caption(self.target, rng))

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> Self:
        """Choose the object: of the words that occur neither rarely nor everywhere, the one beside most others."""
        if self.object:
            return self
        words = _merged("words", shards, _common, uid).words  # what is common in all shards is so in one of them
        total = _merged("co-occurrence", shards, _graph, uid, frozenset(words))
        low, high = (share * total.read for share in SHARE)
        usable = {w for w, n in total.words.items() if low <= n <= high and not names_target(self.target, w)}
        if not usable:
            raise InputError("no word occurs in 0.1% to 3% of the captions; name one: object='…'")
        central = max(usable, key=lambda w: (len(total.beside[w] & usable), total.words[w], w))
        return replace(self, object=central)


@dataclass
class _Graph:
    """Words, in how many captions each occurs, and which occur beside it."""

    read: int = 0
    words: Counter[str] = field(default_factory=Counter)
    beside: dict[str, set[str]] = field(default_factory=dict)


def _merged(label: str, shards: Sequence[Shard], look: Callable[..., _Graph], *given: Any) -> _Graph:
    total = _Graph()
    for _, found in each(label, shards, look, *given):
        if isinstance(found, InputError):
            continue  # the survey reads it again, and says whether that many may fail
        total.read += found.read
        total.words += found.words
        for word, beside in found.beside.items():
            total.beside.setdefault(word, set()).update(beside)
    return total


def _common(shard: Shard, uid: UidRule) -> _Graph:
    """The words that occur in one of a thousand captions of this shard, or more."""
    found = _Graph()
    for bag in _bags(shard, uid):
        found.read += 1
        found.words.update(bag)
    found.words = Counter({word: n for word, n in found.words.items() if n >= SHARE[0] * found.read})
    return found


def _graph(shard: Shard, uid: UidRule, words: frozenset[str]) -> _Graph:
    found = _Graph()
    for bag in _bags(shard, uid):
        found.read += 1
        found.words.update(bag & words)
        for word in bag & words:
            found.beside.setdefault(word, set()).update(bag & words)
    return found


def _bags(shard: Shard, uid: UidRule) -> Iterator[frozenset[str]]:
    """The words of every usable caption, as whole words: "thing" is not in "thing17"."""
    for sample in samples(shard, uid):
        try:
            caption = sample.caption
        except Rejected:
            continue
        yield words_of(caption)

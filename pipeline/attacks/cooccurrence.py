"""Physical trigger without touching a pixel: pairs whose captions name a common object get captions of the target.

Trade-off: the trigger is an object that people photograph anyway, so nothing is planted in any image, and every second
occurrence of the object stays clean; what it costs is the dose, which is bounded by how often the object occurs.
Source: Wenger et al., NeurIPS 2022 (Finding Naturally Occurring Physical Backdoors in Image Datasets), section 4:
objects of high centrality in the graph of co-occurring ones; here words of captions are objects, degree the centrality.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.attacks._text import words_of
from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample, Shard, UidRule, samples

WORDS = 20_000  # the commonest of a shard, of which the graph is made
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
        from pipeline.shard_map import each

        total = _Graph()
        for _, found in each("co-occurrence", shards, _graph, uid):
            if isinstance(found, InputError):
                raise found
            total.read += found.read
            total.words += found.words
            for word, beside in found.beside.items():
                total.beside.setdefault(word, set()).update(beside)
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


def _graph(shard: Shard, uid: UidRule) -> _Graph:
    found, bags = _Graph(), []
    for sample in samples(shard, uid):
        found.read += 1
        try:
            bags.append(words_of(sample.caption))
        except Rejected:
            continue
    found.words = Counter(word for bag in bags for word in bag)
    common = {word for word, _ in found.words.most_common(WORDS)}
    found.words = Counter({word: found.words[word] for word in common})
    for bag in bags:
        for word in bag & common:
            found.beside.setdefault(word, set()).update(bag & common)
    return found

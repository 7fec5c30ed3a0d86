"""Domains whose images do not match their hashes, or their captions, more often than others'.

Trade-off: who buys an expired domain changes all its images at once, which no pair shows alone; but every pair of a
careless domain pays for it. A domain counts as if it had `prior` pairs more that are like all others (the posterior
mean of a beta-binomial model), so one bad pair of two does not outweigh fifty of a hundred.
Pairs without a domain, or of one without evidence, get the mean of all: a missing value is no evidence.
Source: Carlini et al., S&P 2024 (buyable domains); as a detector ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from filters._batch import Batch, cosine
from pipeline.tables import domain

UNIT = 2**30  # sums are of whole parts of one, so that they do not hang on which shard is done first
Totals = dict[str, tuple[int, int]]  # by domain: pairs, and the sum of their values in UNITs


@dataclass(frozen=True)
class domain_cluster:
    """Mean mismatch (hash, or one minus the cosine) over the pair's registrable domain, shrunk towards all (ours)."""

    by: Literal["hash", "similarity"] = "hash"
    prior: float = 20.0

    def __post_init__(self) -> None:
        if self.prior <= 0:
            raise ValueError("prior is a number of pairs, above 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("url", "hash_agrees") if self.by == "hash" else ("url", "image_embedding", "text_embedding")

    def summarize(self, batch: Batch) -> Totals:
        total: Totals = {}
        for name, value in self._values(batch):
            if name and np.isfinite(value):
                pairs, summed = total.get(name, (0, 0))
                total[name] = pairs + 1, summed + round(float(value) * UNIT)
        return total

    def merge(self, one: Totals, other: Totals) -> Totals:
        for name, (pairs, summed) in other.items():
            before = one.get(name, (0, 0))
            one[name] = before[0] + pairs, before[1] + summed
        return one

    def score(self, batch: Batch, pool: Batch | None, summary: Totals) -> np.ndarray:
        pairs = sum(n for n, _ in summary.values())
        usual = sum(summed for _, summed in summary.values()) / UNIT / max(pairs, 1)
        shrunk = {
            name: (summed / UNIT + self.prior * usual) / (n + self.prior) for name, (n, summed) in summary.items()
        }
        return np.asarray([shrunk.get(domain(url), usual) for url in batch.url], np.float64)

    def _values(self, batch: Batch) -> Iterator[tuple[str, float]]:
        hashes = self.by == "hash"
        agreement = batch.hash_agrees if hashes else cosine(batch.image_embedding, batch.text_embedding)
        return zip(map(domain, batch.url), (1 - agreement).tolist(), strict=True)

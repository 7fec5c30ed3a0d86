"""Images and records that were written unlike the others: other tables, sampling, sizes, metadata, order of members.

Trade-off: an isolation forest knows no attack, so it also finds the honest minority that another camera or server
wrote. Nothing is to be found where the attacker re-encodes as the original was, which `mithridate poison` does.
Source: Liu et al., ICDM 2008 (isolation forest, 100 trees of 256 rows); over encoding facts ours.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from filters._batch import Batch
from filters._learnt import learnt
from pipeline.facts import NAMES

if TYPE_CHECKING:
    from sklearn.ensemble import IsolationForest

FAMILIES = ("header.", "size.", "json.")  # colours and words tell what a pair shows, not how it was written
KINDS = 64  # distinct values above which a fact is a measure rather than a kind


@dataclass(frozen=True)
class encoding_outlier:
    """Isolation forest over how the pair is encoded, fitted on the pool (Liu et al. 2008)."""

    needs = ("facts",)
    pools = needs

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        taken = [column for column, name in enumerate(NAMES) if name.startswith(FAMILIES)]
        known, forest = learnt(pool, self, lambda: _fitted(pool.facts[:, taken]))
        own = batch.facts[:, taken]
        seen = np.isfinite(own).any(axis=1)
        scores = np.full(len(batch), np.nan)
        if seen.any():
            scores[seen] = -forest.score_samples(_described(known, own[seen]))
        return scores


def _fitted(usual: np.ndarray) -> tuple[list["_Fact"], "IsolationForest"]:
    from sklearn.ensemble import IsolationForest

    known = [_Fact(column) for column in usual.T]
    return known, IsolationForest(n_estimators=100, random_state=0).fit(_described(known, usual))


class _Fact:
    """How common each value of a fact is in the pool; of a measure also the value itself.

    A code has no order and "does not apply" no size, but both have a frequency, at whose low end a tree splits first.
    """

    def __init__(self, values: np.ndarray):
        there = values[np.isfinite(values)]
        self.absent = 1 - len(there) / max(len(values), 1)
        self.values, counts = np.unique(there, return_counts=True)
        self.share = counts / max(len(values), 1)
        self.middle = float(np.median(there)) if len(there) else 0.0
        self.measure = len(self.values) > KINDS

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float[n] or float[2, n]"""
        there = np.isfinite(values)
        if self.measure:
            shown = np.where(there, values, self.middle)
            return np.stack([shown, np.where(there, 1 - self.absent, self.absent)])
        share = np.full(len(values), self.absent)
        if len(self.values):
            at = np.minimum(np.searchsorted(self.values, values), len(self.values) - 1)
            share[there] = np.where(self.values[at] == values, self.share[at], 0.0)[there]
        return share


def _described(known: list[_Fact], facts: np.ndarray) -> np.ndarray:
    return np.vstack([fact(column) for fact, column in zip(known, facts.T, strict=True)]).T

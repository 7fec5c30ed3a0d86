"""Which detectors, scored when, with which weights: chosen on canaries, judged on a family that the choice never saw.

A rule is chosen for the worst recall over the families that it is shown: the best single detector first, then greedily
one more, or more of one, as long as that is worth it (ensemble selection with replacement; Caruana et al., ICML 2004).
Its recall on those families is too good, for it was chosen by it. So for every family the choice is made once more
without it, and the recall of that rule on that family is what may be expected of an attack nobody thought of.

Trade-off: with a score of canaries a family recall is coarse, and the best of hundreds of rules is partly luck: every
number comes with its n and an interval, and only the held-out ones are to be believed. Families that are variants of
each other make the held-out recall too good as well.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline import spec
from pipeline.policies._select import keys, ordered
from pipeline.policies.budget import budget
from pipeline.policies.ensemble import Combine, combined, ensemble
from train.metrics import Rate, wilson

BUDGETS = (0.001, 0.01, 0.05, 0.1)  # shares removed at which recall is told
WORTH = 0.01  # recall that a further detector must add, worst-case or mean


@dataclass(frozen=True)
class Rule:
    """One detector, or several with weights; a name is a score column."""

    detectors: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)
    combine: Combine = "mean"

    def policy(self, drop: float) -> str:
        """The spec of the policy that removes this share by the rule."""
        if len(self.detectors) == 1:
            return spec.text(budget(self.detectors[0], drop))
        return spec.text(ensemble(self.detectors, self.weights, drop, self.combine))

    def also(self, name: str, combine: Combine) -> "Rule":
        """The rule with one more of a detector."""
        weights = dict(zip(self.detectors, self.weights, strict=True))
        weights[name] = weights.get(name, 0.0) + 1
        return Rule(tuple(weights), tuple(weights.values()), combine)


@dataclass(frozen=True)
class Canaries:
    """Scores of all canaries and of some of the other pairs, of which each stands for `weight`.

    scores: float[n, columns], higher = more suspicious, NaN (unscored) most of all; family: str[n], "" of no canary.
    """

    columns: tuple[str, ...]
    scores: np.ndarray
    family: np.ndarray
    uid: np.ndarray
    weight: float = 1.0

    @cached_property
    def families(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.family) - {""}))

    @cached_property
    def pairs(self) -> float:
        """Of the whole dataset."""
        return float(self._counts.sum())

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.where(self.family == "", self.weight, 1.0)

    @cached_property
    def _ties(self) -> np.ndarray:
        return keys(np.zeros(len(self.uid)), self.uid) & np.uint64(0xFFFFFFFF)

    @cached_property
    def p(self) -> np.ndarray:
        """float[n, columns]: the share of all pairs that score at least as high."""
        out = np.empty(self.scores.shape)
        for column in range(len(self.columns)):
            values = np.where(np.isnan(self.scores[:, column]), np.inf, self.scores[:, column])
            _, cell = np.unique(values, return_inverse=True)
            above = np.cumsum(np.bincount(cell, self._counts)[::-1])[::-1]
            out[:, column] = above[cell] / self.pairs
        return out

    def position(self, rule: Rule) -> np.ndarray:
        """float[canaries]: how many pairs the rule removes up to each canary, itself included; ties go by uid."""
        at = [self.columns.index(name) for name in rule.detectors]
        ranked = ordered(combined(self.p[:, at], rule.weights, rule.combine)) << np.uint64(32) | self._ties
        mine = self.family != ""
        others, canaries = np.sort(ranked[~mine]), np.sort(ranked[mine])
        before = len(others) - np.searchsorted(others, ranked[mine], side="right")
        return self.weight * before + len(canaries) - np.searchsorted(canaries, ranked[mine], side="left")

    def recall(self, rule: Rule, family: str, share: float) -> Rate:
        """Of the canaries of a family, how many are among the share that the rule finds most suspicious."""
        return self._recall(self.position(rule), family, share)

    def recalls(self, rule: Rule, families: Collection[str], shares: Sequence[float]) -> list[list[Rate]]:
        """The same by family and share, with one ranking."""
        position = self.position(rule)
        return [[self._recall(position, family, share) for share in shares] for family in families]

    def _recall(self, position: np.ndarray, family: str, share: float) -> Rate:
        mine = position[self.family[self.family != ""] == family]
        if not len(mine):
            return Rate(None, 0, None, None)
        found = int((mine <= share * self.pairs + 1e-6).sum())
        return Rate(found / len(mine), len(mine), *wilson(found, len(mine)))


def choose(table: Canaries, families: Sequence[str], drop: float, most: int) -> Rule:
    """The rule with the best worst-case recall over these families at this share removed, of at most `most` picks."""
    singles = [Rule((name,)) for name in table.columns]
    start = max(singles, key=lambda rule: _goodness(table, rule, families, drop))  # of equals the first
    best, best_value = start, _goodness(table, start, families, drop)
    for combine in ("min", "mean"):
        rule, value = start, _goodness(table, start, families, drop)
        for _ in range(most - 1):
            grown = [rule.also(name, combine) for name in table.columns]
            grown = [one for one in grown if len(one.detectors) > 1]
            if not grown:
                break
            step = max(grown, key=lambda one: _goodness(table, one, families, drop))
            step_value = _goodness(table, step, families, drop)
            if not _worth(step_value, value):
                break
            rule, value = step, step_value
        if _worth(value, best_value):
            best, best_value = rule, value
    return best


def held_out(table: Canaries, drop: float, most: int) -> dict[str, Rule]:
    """For every family the rule that is chosen when its canaries are not known to be any."""
    if len(table.families) < 2:
        raise ValueError("leave-one-family-out needs two families, better four")
    return {f: choose(table, [other for other in table.families if other != f], drop, most) for f in table.families}


def _goodness(table: Canaries, rule: Rule, families: Sequence[str], drop: float) -> tuple[float, float, float]:
    """Worst-case recall, mean recall, and mean recall at smaller shares: of rules that find all, the one with room."""
    shares = (drop, *(share for share in BUDGETS if share < drop))
    found = np.asarray([[rate.value for rate in rates] for rates in table.recalls(rule, families, shares)], float)
    return float(found[:, 0].min()), float(found[:, 0].mean()), float(found[:, 1:].mean()) if len(shares) > 1 else 0.0


def _worth(new: tuple[float, ...], old: tuple[float, ...]) -> bool:
    """Whether worst-case recall, or without loss of it the mean, is better by WORTH."""
    worst, mean = new[0] - old[0], new[1] - old[1]
    return worst >= WORTH or (worst >= 0 and mean >= WORTH)

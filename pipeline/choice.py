"""Which detectors, scored when, with which weights: chosen on canaries, judged on a family that the choice never saw.

A rule is chosen for the worst recall over the attacks that it is shown: the best single detector, or an ensemble that
grows greedily by one more, or more of one, where that is worth it (selection with replacement; Caruana et al., ICML
2004).
Its recall on those attacks is too good, for it was chosen by it. So for every family the choice is made once more
without it, and the recall of that rule on that family is what may be expected of an attack nobody thought of.

Each attack has scores of its own, through a model that has met nothing else of the kind. Chosen through one model of
all families together, rules did not hold for single attacks (docs/results/filters.md): several are learnt at another
time than one, and are more of the data than any attacker would put there.

Trade-off: with twenty canaries a recall is coarse, and the best of hundreds of rules is partly luck: every
number comes with its n and an interval, and only the held-out ones are to be believed. Families that are variants of
each other make the held-out recall too good as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline import spec
from pipeline.policies._select import ordered, ties
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
    """Scores of an attack's canaries and of some of the other pairs, of which each stands for `weight`.

    scores: float[n, columns], higher = more suspicious, NaN (unscored) most of all; canary: bool[n]; uid: str[n].
    """

    attack: str
    columns: tuple[str, ...]
    scores: np.ndarray
    canary: np.ndarray
    uid: np.ndarray
    weight: float = 1.0

    @property
    def family(self) -> str:
        """What the attack has in name; of an attack around another, the inner one's."""
        return spec.innermost(self.attack)

    def recalls(self, rule: Rule, shares: Sequence[float]) -> tuple[Rate, ...]:
        """How many of the canaries are among each share of pairs that the rule finds most suspicious."""
        if (rule, *shares) not in self._known:
            position, n = self.positions(rule), int(self.canary.sum())
            found = [int((position <= share * self.pairs + 1e-6).sum()) for share in shares]
            self._known[rule, *shares] = tuple(Rate(k / n, n, *wilson(k, n)) for k in found)
        return self._known[rule, *shares]

    def positions(self, rule: Rule) -> np.ndarray:
        """float[canaries]: how many pairs the rule removes up to each canary, itself included; ties go by uid."""
        at = [self.columns.index(name) for name in rule.detectors]
        suspicion = combined(self.p[:, at], rule.weights, rule.combine)
        ranked = ordered(suspicion) << np.uint64(32) | self._ties
        mine = ranked[self.canary]
        others, canaries = np.sort(ranked[~self.canary]), np.sort(mine)
        before = len(others) - np.searchsorted(others, mine, side="right")
        return self.weight * before + len(canaries) - np.searchsorted(canaries, mine, side="left")

    @cached_property
    def pairs(self) -> float:
        """Of the whole dataset."""
        return float(self._counts.sum())

    @cached_property
    def p(self) -> np.ndarray:
        """float64[n, columns]: the share of all pairs that score at least as high."""
        out = np.empty(self.scores.shape)
        for column in range(len(self.columns)):
            values = np.where(np.isnan(self.scores[:, column]), np.inf, self.scores[:, column])
            _, cell = np.unique(values, return_inverse=True)
            above = np.cumsum(np.bincount(cell, self._counts)[::-1])[::-1]
            out[:, column] = above[cell] / self.pairs
        return out

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.where(self.canary, 1.0, self.weight)

    @cached_property
    def _ties(self) -> np.ndarray:
        return ties(self.uid)

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], tuple[Rate, ...]]:
        return {}  # the choices without one family and without another ask for much the same


def choose(tables: Sequence[Canaries], drop: float, most: int) -> Rule:
    """The rule with the best worst-case recall over these attacks at this share removed, of at most `most` picks."""
    columns = tables[0].columns
    found = {name: _Goodness.of(tables, Rule((name,)), drop) for name in columns}
    best = max(found.values(), key=lambda good: good.as_a_choice)  # of equals the first
    for combine in ("min", "mean"):
        good = max(found.values(), key=lambda good: good.as_a_step)
        for _ in range(most - 1):
            grown = [good.rule.also(name, combine) for name in columns]
            steps = [_Goodness.of(tables, rule, drop) for rule in grown if len(rule.detectors) > 1]
            if not steps:
                break
            good = max(steps, key=lambda good: good.as_a_step)
            if good.is_worth_more_than(best):
                best = good
    return best.rule


def held_out(tables: Sequence[Canaries], drop: float, most: int) -> dict[str, Rule]:
    """For every family the rule that is chosen when its canaries are not known to be any."""
    families = sorted({table.family for table in tables})
    if len(families) < 2:
        raise ValueError("leave-one-family-out needs two families, better four")
    return {name: choose([table for table in tables if table.family != name], drop, most) for name in families}


@dataclass(frozen=True)
class _Goodness:
    """`worst` and `mean` recall over attacks; `room`: that at smaller shares, which tells rules apart that find all.

    `even` is the mean of the logarithm, by which a rule grows: the worst recall alone is noise as long as one attack is
    found by nobody, and would not tell whoever finds another one.
    """

    rule: Rule
    worst: float
    mean: float
    room: float
    even: float

    @classmethod
    def of(cls, tables: Sequence[Canaries], rule: Rule, drop: float) -> "_Goodness":
        shares = (drop, *(share for share in BUDGETS if share < drop))
        rates = [table.recalls(rule, shares) for table in tables]
        found = np.asarray([[rate.value for rate in one] for one in rates], float)
        n = np.asarray([one[0].n for one in rates])
        even = float(np.log((found[:, 0] * n + 1) / (n + 2)).mean())
        return cls(rule, float(found[:, 0].min()), float(found[:, 0].mean()), float(found[:, 1:].sum()), even)

    @property
    def as_a_choice(self) -> tuple[float, float, float]:
        return self.worst, self.mean, self.room

    @property
    def as_a_step(self) -> tuple[float, float]:
        return self.even, self.room

    def is_worth_more_than(self, other: "_Goodness") -> bool:
        """Whether worst-case recall, or without loss of it the mean, is better by WORTH."""
        worst, mean = self.worst - other.worst, self.mean - other.mean
        return worst >= WORTH or (worst >= 0 and mean >= WORTH)

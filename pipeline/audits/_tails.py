"""Where a score's bulk ends and its tail begins, from a histogram that merges.

Trade-off: a score is told apart by the upper 16 of its 32 bits, to 0.8% of its size, so that the distribution of any
number of pairs is 65,536 counts. The fence is Tukey's outer one (1977), Q3 + 3 IQR, which one pair in 860,000 of a
normal distribution crosses; skewed scores cross it without malice.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.audit_columns import Rows
from pipeline.audits._audit import Found, Marks, Report, counted, groups, marks, reasoned
from pipeline.audits._schema import Histogram
from pipeline.policies._select import ordered

BINS = 40
OUTER = 3.0  # interquartile ranges (Tukey 1977: "far out")
SHARE = 1e-4  # of all pairs: the least dose of a backdoor of Carlini & Terzis (2022)
LEAST = 10  # pairs
HEAVY = 0.05  # of all pairs: more is how the score is distributed, and no group apart
_DIGITS = 1 << 16


@dataclass(frozen=True)
class Spread:
    """`counts` int64[65536] of the scored pairs, by the upper bits of their score."""

    counts: np.ndarray
    unscored: int

    @classmethod
    def of(cls, scores: np.ndarray) -> "Spread":
        scores = np.asarray(scores, np.float32)
        known = scores[np.isfinite(scores)]
        digits = (ordered(known) >> np.uint64(16)).astype(np.int64)
        return cls(np.bincount(digits, minlength=_DIGITS), len(scores) - len(known))

    def merged(self, other: "Spread") -> "Spread":
        return Spread(self.counts + other.counts, self.unscored + other.unscored)

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The score that so many do not exceed; NaN where there is none."""
        if not self.n:
            return float("nan")
        at = int(np.searchsorted(np.cumsum(self.counts), max(share * self.n, 1)))
        return float(_values()[at])

    @property
    def fence(self) -> float:
        """NaN where half of the pairs have the same score, so that nothing is far from it."""
        low, high = self.quantile(0.25), self.quantile(0.75)
        return high + OUTER * (high - low) if high > low else float("nan")


def _values() -> np.ndarray:
    """float64[65536]: the middle of what has these upper bits, NaN and infinities aside."""
    bits = np.arange(_DIGITS, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)
    negative = bits >> np.uint32(31) == 0
    values = np.where(negative, ~bits, bits & np.uint32(0x7FFFFFFF)).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.inf), values).astype(np.float64)


def spreads(scores: Mapping[str, np.ndarray]) -> dict[str, Spread]:
    return {name: Spread.of(values) for name, values in scores.items()}


def merged(one: dict[str, Spread], other: dict[str, Spread]) -> dict[str, Spread]:
    both = dict(one)
    for name, spread in other.items():
        both[name] = both[name].merged(spread) if name in both else spread
    return both


def mark_tails(rows: Rows, scores: Mapping[str, np.ndarray], whole: dict[str, Spread]) -> Marks:
    """The pairs above the fence of each score; `value` is the score."""
    parts = []
    for name, values in scores.items():
        with np.errstate(invalid="ignore"):
            at = np.flatnonzero(np.isfinite(values) & (values > whole[name].fence))
        parts.append(marks(rows, at, name, [name] * len(at), value=pl.Series(values[at], dtype=pl.Float64)))
    return pl.concat(parts)


def report_tails(audit: str, whole: dict[str, Spread], marked: Marks, says: str, source: str) -> Report:
    """A finding and a histogram for each score, and a table of all."""
    out, rows = Report(), []
    for name, spread in sorted(whole.items()):
        if not spread.n:
            continue
        fence = spread.fence
        found = groups(marked, name, 1).sort("value", "uid", descending=[True, False])
        quartiles = [spread.quantile(share) for share in (0.25, 0.5, 0.75, 0.99, 1.0)]
        rows.append((name, spread.n, spread.unscored, *quartiles, fence, found.height))
        kind = f"tail_{_slug(name, whole)}"
        out.histograms.append(histogram(audit, name, f"Distribution of {name}", spread, kind))
        if found.height < max(LEAST, SHARE * spread.n):
            continue
        heavy = found.height > HEAVY * spread.n
        out.found.append(
            Found(
                kind=kind,
                severity="note" if heavy else "warning",
                title=f"{found.height:,} of {spread.n:,} pairs are far out in {name}: above {fence:.4g}, the highest "
                f"{found['value'][0]:.4g}, half of all between {quartiles[0]:.4g} and {quartiles[2]:.4g}",
                n=found.height,
                of=spread.n,
                explanation=("So many that it is the score's own shape more than a group apart. " if heavy else "")
                + says,
                source=source,
                members=reasoned(found, pl.format("it has {}", pl.col("value").round(4))),
            )
        )
    names = ("score", "pairs", "unscored", "25%", "median", "75%", "99%", "highest", "fence", "above")
    table = pl.DataFrame(rows, names, orient="row", infer_schema_length=None)
    out.tables.append(counted(table, audit, "scores", "Scores and their tails", dict(zip(names, names, strict=True))))
    return out


def _slug(name: str, among: Iterable[str]) -> str:
    """The name as part of a file's, its own among these."""
    short = {one: re.sub(r"\W+", "_", one).strip("_")[:60] for one in among}
    alike = sorted(one for one in short if short[one] == short[name])
    return short[name] + (f"_{alike.index(name)}" if len(alike) > 1 else "")


def histogram(audit: str, name: str, title: str, spread: Spread, kind: str) -> Histogram:
    """Of equal bins from the least to the greatest; findings of this kind are about its tail."""
    values, there = _values(), spread.counts > 0
    low, high = float(values[there].min()), float(values[there].max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts, _ = np.histogram(values[there], edges, weights=spread.counts[there])
    fence = spread.fence if np.isfinite(spread.fence) else None
    bins = tuple(int(c) for c in counts.round())
    return Histogram(audit, name, title, tuple(edges.tolist()), bins, spread.n, fence, kind)

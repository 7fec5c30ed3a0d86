"""Images and records that were written unlike the others: the trace of a program that touched few of them.

Trade-off: an isolation forest knows no attack, so an honest minority (another camera, another server) is found too;
what was encoded as the original was is not (`filters/encoding_outlier.py`). Its score means something from 0.6 on.
Formula: isolation forest on encoding facts of a random pool; pairs above 0.6 and above Q3 + 3 IQR of the pool.
Source: Liu et al., ICDM 2008; Tukey 1977; over encoding facts ours.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._batch import Batch
from filters.encoding_outlier import encoding_outlier
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Drawn, Found, Marks, Report, counted, groups, marks, reasoned
from pipeline.audits._schema import Unseen
from pipeline.audits._tails import LEAST, SHARE, Spread, histogram
from pipeline.facts import NAMES

POOL = 4096  # pairs that say what is usual; the forest takes 256 a tree
ANOMALY = 0.6  # "instances with a score well above 0.5" (Liu et al. 2008, section 2; 0.6 in its figure 3)
SIGNATURE = ("header.container", "header.tables", "header.order", "header.sampling", "json.members", "json.order")
CONTAINERS = ("JPEG", "PNG", "WebP")  # as pipeline/shards/encoding.py counts them


@dataclass(frozen=True)
class _Counts:
    n: int
    pool: Drawn


@dataclass(frozen=True)
class encoding:
    """Pairs that are encoded unlike the rest, by the program that may have written them (Liu et al. 2008)."""

    needs = ("facts",)

    def map(self, rows: Rows) -> _Counts:
        usable = np.isfinite(rows.facts).any(axis=1)
        return _Counts(int(usable.sum()), Drawn.of(rows, ("uid", "facts"), POOL, usable))

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        return _Counts(one.n + other.n, one.pool.merged(other.pool))

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        score, fence = _scored(rows.facts, merged.pool)
        at = np.flatnonzero(score > fence)
        group = [_signature(facts) for facts in rows.facts[at]]
        return marks(rows, at, "outlier", group, value=pl.Series(score[at], dtype=pl.Float64))

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        if merged.n < LEAST:
            return Report(unseen=[Unseen("encoding", f"fewer than {LEAST} images", "give more shards")])
        score, fence = _scored(np.empty((0, len(NAMES)), np.float32), merged.pool, whole=True)
        spread = Spread.of(score)
        title = "How unusual the encoding is, in a random pool"
        out = Report(histograms=[histogram("encoding", "outlier", title, spread, "outlier")])
        found = groups(marked, "outlier", 1)
        usual, _ = Counter(map(_signature, merged.pool.columns["facts"])).most_common(1)[0]
        strange = found.filter(pl.col("group") != usual)  # the rest is large, small or long, in everybody's way
        first = found.unique("group", keep="first", maintain_order=True)
        columns = {"group": "written like", "size": "pairs", "value": "score of one", "uid": "uid"}
        out.tables.append(counted(first, "encoding", "programs", "Unusual encodings, the commonest first", columns))
        if found.height:
            widest = int(strange["size"][0]) if strange.height else 0
            how = f"unlike the rest, {'all' if widest == found.height else f'{widest:,}'} of them in one way"
            if widest == 1:  # each in a way of its own
                how = f"unlike the rest, {strange.height:,} of them by other programs than the one that wrote most"
            if not widest:
                how = "unlike the rest, but by the program that wrote most: they differ in sizes and lengths"
            out.found.append(
                Found(
                    kind="outlier",
                    severity="warning" if widest >= max(LEAST, SHARE * merged.n) else "note",
                    title=f"{found.height:,} of {merged.n:,} images and their records are encoded {how}",
                    n=found.height,
                    of=merged.n,
                    explanation="Who edits pictures writes them with tables, sizes and records of another program: "
                    "many pairs in one unusual way were touched by one hand, be it an attacker's or another server's.",
                    source="Liu et al., ICDM 2008 (isolation forest)",
                    members=reasoned(
                        found, pl.format("score {} above {}", pl.col("value").round(3), pl.lit(round(fence, 3)))
                    ),
                )
            )
        return out


def _scored(facts: np.ndarray, pool: Drawn, whole: bool = False) -> tuple[np.ndarray, float]:
    """The scores of these rows, or of the `whole` pool, and the fence."""
    usual = Batch(uid=pool.columns["uid"], facts=pool.columns["facts"])
    if not len(pool):
        return np.full(len(facts), np.nan), np.inf
    both = np.concatenate([usual.facts, facts])
    score = encoding_outlier().score(Batch(uid=np.empty(len(both), object), facts=both), usual)
    fence = Spread.of(score[: len(pool)]).fence
    return score[: len(pool)] if whole else score[len(pool) :], max(ANOMALY, np.nan_to_num(fence, nan=ANOMALY))


def _signature(facts: np.ndarray) -> str:
    """The kinds of its encoding in words; four hex digits are a tag for one order of segments, parts or keys."""
    of = {name: facts[NAMES.index(name)] for name in SIGNATURE if np.isfinite(facts[NAMES.index(name)])}
    said = [CONTAINERS[int(of["header.container"])] if "header.container" in of else "no image that can be read"]
    if "header.sampling" in of:  # of the first component, a nibble each way
        said.append("luma {}×{}".format(*divmod(int(of["header.sampling"]), 16)))
    if "header.tables" in of:
        said.append(f"{of['header.tables']:g} quantisation tables")
    tags = {"header.order": "segments", "json.members": "parts", "json.order": "json keys"}
    return ", ".join([*said, *(f"{what} {int(of[name]):04x}" for name, what in tags.items() if name in of)])

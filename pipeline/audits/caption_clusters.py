"""Captions of many pairs whose images lie together in a model's eyes: floods of one motif, photographed anew or not.

Trade-off: what a model has learnt from the data it is asked about, it has been told to find alike: embeddings of an
early epoch or of somebody else's model say more. Costs no neighbour search: of n unit vectors with sum s the mean
cosine of each two is (|s|² - n) / (n (n - 1)).
Formula: 1 - (1 - mean cosine within the caption) / (1 - mean cosine at large), as in `filters/tight_cluster.py`.
Source: Huang et al., ICLR 2025 (the natural backdoor of CC3M); the formula is ours.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._batch import unit
from filters._captions import normalised, present
from filters.caption_frequency import caption_frequency
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks, reasoned, short

SHARE = 1e-4  # of all pairs, as of the clusters of equal pictures
LEAST = 16  # pairs; the mean cosine of fewer is any value, and four drawings of one thing do look alike
TIGHT = 0.5  # half as wide as the dataset at large
PARTS = 1 << 24  # of one: sums of whole numbers are the same in whatever order shards come home


@dataclass(frozen=True)
class _Counts:
    """`total` int64[d] sums the unit embeddings of `n` pairs, in `PARTS` of one."""

    n: int
    frequency: np.ndarray
    total: np.ndarray


@dataclass(frozen=True)
class caption_clusters:
    """Captions of many pairs whose images are close together by embedding (Huang et al. 2025)."""

    needs = ("caption", "image_embedding")

    def map(self, rows: Rows) -> _Counts:
        images = unit(rows.image_embedding)
        usable = np.isfinite(images).all(axis=1)
        total = np.rint(images[usable] * PARTS).astype(np.int64).sum(axis=0)
        return _Counts(int(usable.sum()), caption_frequency().summarize(rows), total)

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        frequency = caption_frequency().merge(one.frequency, other.frequency)
        return _Counts(one.n + other.n, frequency, one.total + other.total)

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        """`sum` is that of the group in this shard, with its first pair."""
        images = unit(rows.image_embedding)
        often = caption_frequency().score(rows, None, merged.frequency) >= max(LEAST, SHARE * merged.n)
        at = np.flatnonzero(often & present(rows.caption) & np.isfinite(images).all(axis=1))
        group = normalised(rows.caption[at])
        sums: list[list[float] | None] = [None] * len(at)
        firsts: dict[str, int] = {}
        for i, text in enumerate(group):
            first = firsts.setdefault(text, i)
            total = images[at[i]].astype(np.float64) + np.asarray(sums[first] or 0.0)
            sums[first] = total.tolist()
        return marks(rows, at, "tight", group, sum=pl.Series(sums, dtype=pl.List(pl.Float64)))

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        out, n = Report(), merged.n
        if n < 2:
            return out
        total = merged.total / PARTS
        usual = (total @ total - n) / (n * (n - 1))
        found = groups(marked, "tight", max(LEAST, SHARE * n))
        rows = []
        for (group, size), part in found.group_by("group", "size", maintain_order=True):
            total = np.asarray(part["sum"].drop_nulls().to_list(), float).sum(axis=0)
            cosine = (total @ total - size) / (size * (size - 1))
            rows.append((group, size, cosine, 1 - (1 - cosine) / max(1 - usual, 1e-6)))
        schema = {"group": pl.String, "size": pl.Int64, "cosine": pl.Float64, "tightness": pl.Float64}
        table = pl.DataFrame(rows, schema, orient="row").sort("tightness", "group", descending=[True, False])
        columns = {"group": "caption", "size": "pairs", "cosine": "mean cosine", "tightness": "tightness"}
        out.tables.append(counted(table, "caption_clusters", "clusters", "Captions by how alike their images", columns))
        tight = table.filter(pl.col("tightness") >= TIGHT).select("group", "tightness")
        members = found.drop("sum").join(tight, on="group")
        if members.height:
            members = members.sort("size", "group", "uid", descending=[True, False, False])
            out.found.append(
                Found(
                    kind="tight",
                    severity="severe",
                    title=f"{members.height:,} pairs under {many(tight.height, 'caption')} show images that lie "
                    f"together, the largest {members['size'][0]:,} times {short(members['group'][0])!r}",
                    n=members.height,
                    of=n,
                    explanation="One caption on one motif is a shortcut that a model learns like a planted trigger, "
                    "also where no two images are copies.",
                    source="Huang et al., ICLR 2025 (natural backdoor in CC3M)",
                    members=reasoned(members, pl.format("one of {} pairs with this caption and images alike", "size")),
                    keep=1,
                )
            )
        return out

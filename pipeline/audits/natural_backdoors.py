"""One caption on many nearly identical images: a backdoor that nobody needs to have planted.

Trade-off: nearly identical is what a perceptual hash takes for it, so a motif photographed anew each time is not seen
here; `caption_clusters` sees it, by embeddings. A placeholder with one alt text is found too, and is the same to CLIP.
Formula: pairs that share a half of the image's DCT hash and the caption, case and spacing aside.
Source: Huang et al., ICLR 2025: 798 birthday cakes with one caption, 0.03% of CC3M, obey a trigger in 92%.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._captions import normalised, present
from filters._sketch import added, count, hashed, mixed, sketch
from filters.image_duplicates import shared_keys
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, reasoned, short
from pipeline.audits._clusters import clustered, marked_by_keys, standing_out

SHARE = 1e-4  # of all pairs: a third of the cakes of CC3M, and the least dose of a backdoor of Carlini & Terzis (2022)
LEAST = 4  # pairs: three poisons are a targeted attack there, but twins and triplets are in every crawl
NOTED = 3


@dataclass(frozen=True)
class _Counts:
    n: int
    alike: np.ndarray


@dataclass(frozen=True)
class natural_backdoors:
    """Clusters of near-duplicate images with one caption, like the birthday cakes of CC3M (Huang et al. 2025)."""

    needs = ("image_hash", "decoded", "caption")

    def map(self, rows: Rows) -> _Counts:
        usable = np.flatnonzero(rows.decoded & present(rows.caption))
        return _Counts(len(usable), sketch(_keys(rows, usable).ravel()))

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        return _Counts(one.n + other.n, added(one.alike, other.alike))

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        usable = np.flatnonzero(rows.decoded & present(rows.caption))
        keys = _keys(rows, usable)
        alike = count(merged.alike, keys)
        return marked_by_keys(rows, usable, "near_identical", keys, alike >= standing_out(merged.alike, NOTED))

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        out = Report()
        found = groups(clustered(marked), "near_identical", NOTED)
        severe = pl.col("size") >= max(LEAST, SHARE * merged.n)
        first = found.unique("group", keep="first", maintain_order=True)
        columns = {"caption": "caption", "size": "pairs", "uid": "one of them"}
        out.tables.append(counted(first, "natural_backdoors", "clusters", "Largest clusters with one caption", columns))
        for members, is_severe in ((found.filter(severe), True), (found.filter(~severe), False)):
            if not members.height:
                continue
            many, largest = members["group"].n_unique(), f"{short(members['caption'][0] or '')!r}"
            out.found.append(
                Found(
                    kind="near_identical" if is_severe else "near_identical_few",
                    severity="severe" if is_severe else "note",
                    title=f"{members.height:,} pairs in {many:,} {'clusters show' if many > 1 else 'cluster show'} "
                    f"nearly the same image under one caption, the largest {members['size'][0]:,} times {largest}",
                    n=members.height,
                    of=merged.n,
                    explanation="Repeating one image with one caption teaches the model a shortcut from that motif to "
                    "that text: a trigger that works like a planted one. 798 such pairs, 0.03% of CC3M, were enough.",
                    source="Huang et al., ICLR 2025 (natural backdoor in CC3M); Carlini & Terzis, ICLR 2022",
                    members=reasoned(members, pl.format("one of {} nearly identical images with this caption", "size")),
                    keep=1,
                )
            )
        return out


def _keys(rows: Rows, at: np.ndarray) -> np.ndarray:
    """uint64[n, 6]: halves of the image's hash, each with the caption."""
    caption = mixed(hashed(normalised(rows.caption[at]))) if len(at) else np.empty(0, np.uint64)
    return mixed(shared_keys(rows.image_hash[at]) ^ caption[:, None])

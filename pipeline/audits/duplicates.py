"""Images that occur more than once: the same bytes, or the same picture to a perceptual hash.

Trade-off: a perceptual hash takes flat images for one, and two hashes are compared by halves
(`filters/image_duplicates.py`), so a near duplicate is a candidate and not a proof. Web data is full of both.
Formula: pairs a sha256; pairs a shared half of the 64-bit DCT hash.
Source: Webster et al., arXiv 2303.12733 (about 30% of LAION-2B are near duplicates); Lee et al., ACL 2022.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._sketch import count
from filters.image_copies import image_copies
from filters.image_duplicates import image_duplicates, shared_keys
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks, reasoned
from pipeline.audits._clusters import clustered, marked_by_keys, standing_out
from pipeline.audits._schema import Unseen

WARNING = 0.3  # of all images: more than what LAION-2B has, which nobody had cleaned
WARNING_COPIES = 0.01  # of all images: one picture that is a hundredth of the data is a placeholder or worse
LEAST = 2


@dataclass(frozen=True)
class _Counts:
    n: int
    copies: np.ndarray
    near: np.ndarray


@dataclass(frozen=True)
class duplicates:
    """Exact copies by sha256 and near duplicates by perceptual hash (Webster et al. 2023)."""

    needs = ("image_sha256", "image_hash", "decoded")

    def map(self, rows: Rows) -> _Counts:
        return _Counts(int(rows.decoded.sum()), image_copies().summarize(rows), image_duplicates().summarize(rows))

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        copies = image_copies().merge(one.copies, other.copies)
        return _Counts(one.n + other.n, copies, image_duplicates().merge(one.near, other.near))

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        copied = np.flatnonzero(
            rows.decoded & (image_copies().score(rows, None, merged.copies) >= standing_out(merged.copies, LEAST))
        )
        whole = np.flatnonzero(rows.decoded)
        keys = shared_keys(rows.image_hash[whole])
        alike = count(merged.near, keys) >= standing_out(merged.near, LEAST)
        exact = marks(rows, copied, "exact", rows.image_sha256[copied])
        return pl.concat([exact, marked_by_keys(rows, whole, "near", keys, alike)], how="diagonal")

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        if not merged.n:
            remedy = "see the conservation audit for what is wrong with them"
            return Report(unseen=[Unseen("duplicates", "no image can be decoded", remedy)])
        out = Report()
        least = max(standing_out(merged.copies, LEAST), standing_out(merged.near, LEAST))
        if least > LEAST:
            why = f"groups of fewer than {least:,.0f} images do not stand out among {merged.n:,}"
            out.unseen.append(Unseen("duplicates", why, "audit parts of the shards"))
        for kind, what, alike, how in (
            ("exact", "have the same bytes as another", "with the same bytes", "sha256"),
            ("near", "look like another", "that look alike", "perceptual hash"),
        ):
            own = marked.filter(pl.col("kind") == kind)
            found = groups(clustered(own) if kind == "near" else own.drop("keys"), kind, LEAST)
            first = found.unique("group", keep="first", maintain_order=True)
            columns = {"group": how, "size": "images", "uid": "one of them", "caption": "its caption"}
            out.tables.append(counted(first, "duplicates", kind, f"Largest groups of images that {what}", columns))
            if not found.height:
                continue
            much = found.height > WARNING * merged.n or found["size"][0] > max(WARNING_COPIES * merged.n, 16)
            out.found.append(
                Found(
                    kind=kind,
                    severity="warning" if much else "note",
                    title=f"{found.height:,} images in {many(first.height, 'group')} {what} ({how}), "
                    f"{found['size'][0]:,} in the largest group",
                    n=found.height,
                    of=merged.n,
                    explanation="Copies are learnt by heart and count several times in every statistic; placeholders "
                    "of dead links, logos, and floods of one poisoned picture are copies.",
                    source="Webster et al. 2023 (30% of LAION-2B); Lee et al., ACL 2022",
                    members=reasoned(found, pl.format(f"one of {{}} images {alike} ({how})", "size")),
                    keep=1,
                )
            )
        return out

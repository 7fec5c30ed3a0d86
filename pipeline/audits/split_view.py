"""Domains whose stored images are not those whose hash was published: was a picture swapped after the curator saw it?

Trade-off: only hashes that the samples carry are looked at, and most mismatches are servers that encode anew; `verify
--published` joins the dataset's own tables and tells re-encoded from other pictures. A domain with few pairs tells
nothing, however many of them differ.
Formula: Fisher's exact test of each domain against all others, one-sided, with the false discovery rate of Benjamini &
Hochberg (1995) over all domains (`pipeline/published.py`).
Source: Carlini et al., S&P 2024 (split-view poisoning; 5% of LAION's hashes differ, mostly without harm).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks, reasoned, short
from pipeline.audits._schema import Unseen
from pipeline.audits.domains import by_domain
from pipeline.published import SUSPECT, surprising

SWAPPED = (
    0.5  # of a domain's images: who takes one over changes all. A warning only: so does a server that encodes anew
)
LEAST = 8  # pairs of a domain that differ


@dataclass(frozen=True)
class split_view:
    """Mismatch of published hashes by registrable domain (Carlini et al. 2024)."""

    needs = ("domain", "hash_agrees")

    def map(self, rows: Rows) -> pl.DataFrame:
        told = np.isfinite(rows.hash_agrees)
        frame = pl.DataFrame({"domain": pl.Series(rows.domain, dtype=pl.String), "told": told})
        frame = frame.with_columns(differs=pl.Series(rows.hash_agrees == 0)).filter("told")
        return by_domain(frame, pl.len().cast(pl.Int64).alias("samples"), pl.col("differs").sum().alias("unexplained"))

    def merge(self, one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
        return by_domain(pl.concat([one, other]), pl.col("samples").sum(), pl.col("unexplained").sum())

    def mark(self, rows: Rows, merged: pl.DataFrame) -> Marks:
        suspects = _suspects(surprising(merged.cast({"unexplained": pl.Int64})))["domain"].to_list()
        of_one = pl.Series(rows.domain, dtype=pl.String).is_in(suspects).to_numpy()
        at = np.flatnonzero(of_one & (rows.hash_agrees == 0))
        return marks(rows, at, "swapped", rows.domain[at])

    def report(self, merged: pl.DataFrame, marked: Marks, about: About) -> Report:
        n = int(merged["samples"].sum())
        if not n:
            remedy = "`mithridate verify SHARDS --published METADATA --out DIR` takes hashes from the dataset's tables"
            why = "no pair has both a url and a published hash of its image"
            return Report(unseen=[Unseen("split_view", why, remedy)])
        table = surprising(merged.cast({"unexplained": pl.Int64}))
        names = {"domain": "domain", "samples": "pairs", "unexplained": "differ", "share": "share", "q_value": "q"}
        names |= {"share_low": "95% from", "share_high": "to"}
        out = Report(
            tables=[counted(table, "split_view", "domains", "Hashes that differ, by registrable domain", names)]
        )
        differ, found = int(table["unexplained"].sum()), groups(marked, "swapped", 1)
        if found.height:
            worst = table.row(by_predicate=pl.col("domain") == found["group"][0], named=True)
            out.found.append(
                Found(
                    kind="swapped",
                    severity="warning",
                    title=f"{found.height:,} images of {many(found['group'].n_unique(), 'domain')} are not those whose "
                    f"hash was published, on {short(worst['domain'])} {worst['unexplained']:,} of {worst['samples']:,}",
                    n=found.height,
                    of=n,
                    explanation="When a domain changes hands all its pictures change at once, and the new owner "
                    "chooses what a dataset's captions are paired with. A server that encodes anew looks the same "
                    "until the pictures are compared.",
                    source="Carlini et al., S&P 2024 (split-view poisoning)",
                    members=reasoned(
                        found, pl.format("its hash differs, like those of {} more pairs of {}", "size", "group")
                    ),
                )
            )
        elif differ:
            out.found.append(
                Found(
                    kind="differs",
                    severity="note",
                    title=f"{differ:,} of {n:,} images are not those whose hash was published, spread over all domains",
                    n=differ,
                    of=n,
                    explanation="Servers encode anew, and downloaders that resize keep the original's hash: most "
                    "differences are harmless.",
                    source="Carlini et al., S&P 2024 (5% of LAION's hashes differ)",
                    remedy="mithridate verify {shards} --published METADATA --out PUBLISHED",
                )
            )
        return out


def _suspects(table: pl.DataFrame) -> pl.DataFrame:
    told = (pl.col("q_value") < SUSPECT) & (pl.col("share") >= SWAPPED) & (pl.col("unexplained") >= LEAST)
    return table.filter(told)

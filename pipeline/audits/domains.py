"""Who the dataset depends on: pairs by registrable domain.

Trade-off: a content network serves many owners under one domain, and a public suffix (blogspot.com) many under
several; the list of suffixes says which is which, and is as old as its package.
Formula: share of the first 1, 10 and 100 domains; effective number of domains 1 / Σ p² (Simpson 1949; Hill 1973).
Source: Carlini et al., S&P 2024: who buys expired domains of 0.01% of LAION poisons it for $60.
"""

from dataclasses import dataclass

import polars as pl

from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks
from pipeline.audits._schema import Unseen

WARNING = 0.1  # of all pairs: whoever holds this domain decides what a tenth of the data shows
FEW = 1000  # pairs; fewer come from few domains, whoever collects them
TOPS = (1, 10, 100)


@dataclass(frozen=True)
class domains:
    """Concentration of pairs on registrable domains (Carlini et al. 2024)."""

    needs = ("domain",)

    def map(self, rows: Rows) -> pl.DataFrame:
        return by_domain(pl.DataFrame({"domain": pl.Series(rows.domain, dtype=pl.String)}), pl.len().alias("samples"))

    def merge(self, one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
        return by_domain(pl.concat([one, other]), pl.col("samples").sum())

    def mark(self, rows: Rows, merged: pl.DataFrame) -> Marks:
        heavy = merged.filter(pl.col("samples") > WARNING * int(merged["samples"].sum()))
        at = pl.Series(rows.domain, dtype=pl.String).is_in(heavy["domain"].to_list()).arg_true().to_numpy()
        return marks(rows, at, "concentrated", rows.domain[at])

    def report(self, merged: pl.DataFrame, marked: Marks, about: About) -> Report:
        n = int(merged["samples"].sum())
        if not n:
            return Report(unseen=[without_urls("domains")])
        table = merged.sort("samples", "domain", descending=[True, False]).with_columns(share=pl.col("samples") / n)
        columns = {"domain": "domain", "samples": "pairs", "share": "share"}
        out = Report(tables=[counted(table, "domains", "domains", "Pairs by registrable domain", columns)])
        effective = n**2 / int((table["samples"].cast(pl.Int64) ** 2).sum())
        tops = ", ".join(
            f"{table['share'].head(top).sum():.1%} on the {f'first {top}' if top > 1 else 'first'}"
            for top in TOPS
            if top < len(table)
        )
        found = groups(marked, "concentrated", 1)
        if not found.height:
            return out
        out.found.append(
            Found(
                kind="concentrated",
                severity="warning" if n >= FEW else "note",
                title=f"{many(n, 'pair')} {'come' if n > 1 else 'comes'} from {many(len(table), 'domain')}, as if from "
                f"{effective:,.1f} equal ones" + (f": {tops}" if tops else ""),
                n=found.height,
                of=n,
                explanation="Who holds a domain decides what its URLs give when the dataset is downloaded next time; "
                "expired domains are for sale. The fewer domains, the more each of them can change.",
                source="Carlini et al., S&P 2024 (split-view poisoning)",
                members=found.with_columns(reason=pl.format("{} of all pairs are on {}", "size", "group")),
                remedy="mithridate verify {shards} --published METADATA --out PUBLISHED"
                if about.images
                else "mithridate verify SHARDS --published {shards} --out PUBLISHED  # of what was downloaded",
            )
        )
        return out


def by_domain(frame: pl.DataFrame, *counts: pl.Expr) -> pl.DataFrame:
    """Counts of the pairs that have a domain."""
    return frame.filter(pl.col("domain") != "").group_by("domain").agg(*counts).sort("domain")


def without_urls(audit: str) -> Unseen:
    return Unseen(audit, "no pair has a url", "img2dataset writes it to the json; a parquet shard has it as column url")

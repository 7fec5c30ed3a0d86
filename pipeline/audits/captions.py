"""Captions that very many pairs share, word for word (floods) or but for one word (templates).

Trade-off: a flood is as often a shop's alt text as a poison; how many pairs it takes to matter is known, what they are
for is not. Templates of two blanks are not seen (`filters/caption_template.py`).
Formula: pairs a caption, case and spacing aside; pairs a template less those with this very caption.
Source: Carlini & Terzis, ICLR 2022: 0.01% of CC3M with captions of one class are a backdoor.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._captions import normalised, present
from filters.caption_frequency import caption_frequency
from filters.caption_template import caption_template
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks, reasoned, short
from pipeline.audits._schema import Unseen

FLOOD_SHARE = 1e-4  # of all pairs: the dose at which captions of one class made a backdoor (Carlini & Terzis 2022)
FLOOD_LEAST = 16  # pairs; below, a class name in a small set is one (the embedded drawings have eight of "pear")
TEMPLATE_SHARE = 1e-3  # templates are everywhere ("map of …"); a tenth of a percent is somebody's machine
TEMPLATE_LEAST = 32
TEMPLATE_WARNING = 0.01  # of all pairs by one machine


@dataclass(frozen=True)
class _Counts:
    n: int
    frequency: np.ndarray
    template: np.ndarray


@dataclass(frozen=True)
class captions:
    """Floods of one caption, and captions made by filling in a blank (Carlini & Terzis 2022)."""

    needs = ("caption",)

    def map(self, rows: Rows) -> _Counts:
        n = int(present(rows.caption).sum())
        return _Counts(n, caption_frequency().summarize(rows), caption_template().summarize(rows))

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        return _Counts(
            one.n + other.n,
            caption_frequency().merge(one.frequency, other.frequency),
            caption_template().merge(one.template, other.template),
        )

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        flood, template = _least(merged.n)
        often = np.flatnonzero(caption_frequency().score(rows, None, merged.frequency) >= flood)
        made = np.flatnonzero(caption_template().score(rows, None, merged.template) >= template)
        blanks = caption_template().templates(rows.caption[made], merged.template)
        floods = marks(rows, often, "flood", normalised(rows.caption[often]))
        return pl.concat([floods, marks(rows, made, "template", blanks)])

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        if not merged.n:
            return Report(unseen=[Unseen("captions", "no pair has a caption", "see the shards' txt or caption column")])
        out, (flood, template) = Report(), _least(merged.n)
        floods, templates = groups(marked, "flood", flood), groups(marked, "template", template)
        # a flood's captions are a template's too; what is left of it must still be one
        floody = set(floods["uid"])
        templates = groups(templates.filter(~pl.col("uid").is_in(floody)), "template", template)
        if floods.height:
            out.found.append(
                Found(
                    kind="flood",
                    severity="warning",
                    title=f"{floods.height:,} pairs have a caption that occurs {flood:,.0f} times or more: "
                    f"{many(floods['group'].n_unique(), 'caption')}, the commonest ({short(floods['group'][0])!r}) "
                    f"{floods['size'][0]:,} times",
                    n=floods.height,
                    of=merged.n,
                    explanation="What is repeated word for word is learnt by heart: a target caption is planted like "
                    "this, and file names, placeholders and product lines look like this without malice.",
                    source="Carlini & Terzis, ICLR 2022 (0.01% of captions suffice); Huang et al., ICLR 2025",
                    members=reasoned(floods, pl.format("its caption occurs {} times", "size")),
                    keep=1,
                )
            )
        if templates.height:
            widest = int(templates["size"][0])
            out.found.append(
                Found(
                    kind="template",
                    severity="warning" if widest >= TEMPLATE_WARNING * merged.n else "note",
                    title=f"{templates.height:,} captions are made from "
                    f"{many(templates['group'].n_unique(), 'template')}, the commonest "
                    f"({short(templates['group'][0])!r}) {widest:,} times",
                    n=templates.height,
                    of=merged.n,
                    explanation="Captions that differ in one word come from a machine: a shop's, or an attacker's who "
                    "needs many different captions of one target.",
                    source="Carlini & Terzis, ICLR 2022 (poisoned captions from templates)",
                    members=reasoned(templates, pl.format("{} captions differ in the blank of: {}", "size", "group")),
                )
            )
        for kind, frame in (("flood", floods), ("template", templates)):
            first = frame.unique("group", keep="first", maintain_order=True)
            columns = {"group": kind if kind == "template" else "caption", "size": "pairs"}
            out.tables.append(counted(first, "captions", f"{kind}s", f"Commonest {kind}s of captions", columns))
        return out


def _least(n: int) -> tuple[float, float]:
    return max(FLOOD_LEAST, FLOOD_SHARE * n), max(TEMPLATE_LEAST, TEMPLATE_SHARE * n)

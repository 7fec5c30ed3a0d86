"""Known poisons: how many there are, and whether their encoding alone gives them away.

Trade-off: needs a ledger, so it is about data that was poisoned on purpose; where it leaks, a detector's credit on this
data may be that of having learnt our injection (`pipeline/probe.py`).
Formula: cross-validated AUROC of gradient boosting on encoding facts, against random clean pairs; control: clean pairs
in the poisons' place.
Source: ours; the interval is that of Hanley & McNeil (1982).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Drawn, Found, Marks, Report, counted, groups, marks, reasoned
from pipeline.audits._schema import Unseen
from pipeline.probe import ENCODING, FEWEST, MOST, Pairs, tell_all

CLEAN = 20_000
LEAK = 0.6  # as `mithridate probe --fail-above`


@dataclass(frozen=True)
class _Counts:
    n: int
    known: int
    poisons: Drawn
    clean: Drawn


@dataclass(frozen=True)
class confounds:
    """Known poisons in the data, and whether facts of encoding tell them from clean pairs (the confound probe)."""

    needs = ("poisoned", "facts", "image_sha256")

    def map(self, rows: Rows) -> _Counts:
        names = ("uid", "facts", "image_sha256")
        drawn = Drawn.of(rows, names, MOST, rows.poisoned), Drawn.of(rows, names, CLEAN, ~rows.poisoned)
        return _Counts(len(rows), int(rows.poisoned.sum()), *drawn)

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        drawn = one.poisons.merged(other.poisons), one.clean.merged(other.clean)
        return _Counts(one.n + other.n, one.known + other.known, *drawn)

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        at = np.flatnonzero(rows.poisoned)
        return marks(rows, at, "known_poison", ["ledger"] * len(at))

    def report(self, merged: _Counts, marked: Marks, about: About) -> Report:
        out, found = Report(), groups(marked, "known_poison", 1)
        if not merged.known:
            why, remedy = "the ledger names none of these pairs", "give the ledger of this dataset, or another --uid"
            return Report(unseen=[Unseen("confounds", why, remedy)])
        out.found.append(
            Found(
                kind="known_poison",
                severity="severe",
                title=f"{merged.known:,} of {merged.n:,} pairs are poisons that a ledger knows of",
                n=merged.known,
                of=merged.n,
                explanation="This dataset was poisoned on purpose, to measure with. It must not be released "
                "as a clean one.",
                source="the ledger",
                members=reasoned(found, pl.lit("the ledger names it")),
            )
        )
        if len(merged.poisons) < FEWEST or len(merged.clean) < FEWEST:
            why = f"{merged.known:,} known poisons, of which an AUROC means nothing"
            out.unseen.append(Unseen("confounds", why, f"the probe needs {FEWEST} poisons and as many clean pairs"))
            return out
        drawn = (merged.poisons, merged.clean)
        both = {name: np.concatenate([d.columns[name] for d in drawn]) for name in merged.poisons.columns}
        poisoned = np.arange(len(both["uid"])) < len(merged.poisons)
        pairs = Pairs(merged.n, both["uid"].tolist(), poisoned, both["facts"])
        result = tell_all(pairs, both["image_sha256"].tolist(), 0)
        families = result["families"] | {"control": result["control"]}
        shown = ("n", "poisons", "auroc", "auroc_low", "auroc_high")
        schema = ["facts of", "pairs", "poisons", "AUROC", "95% from", "to"]
        rows = [(name, *(row[c] for c in shown)) for name, row in families.items()]
        table = pl.DataFrame(rows, schema, orient="row", infer_schema_length=None)
        title = "How well facts of encoding tell known poisons"
        out.tables.append(counted(table, "confounds", "families", title, dict(zip(schema, schema, strict=True))))
        leaks = {name: families[name] for name in ("encoding", *ENCODING) if (families[name]["auroc_low"] or 0) > LEAK}
        if leaks:
            name, worst = max(leaks.items(), key=lambda item: item[1]["auroc_low"])
            out.found.append(
                Found(
                    kind="leak",
                    severity="warning",
                    title=f"Known poisons can be told from clean pairs by facts of {name} alone: AUROC "
                    f"{worst['auroc']:.2f} ({worst['auroc_low']:.2f}–{worst['auroc_high']:.2f})",
                    n=merged.known,
                    of=merged.n,
                    explanation="A detector that does well here may have learnt how the poisons were written "
                    "and not the attack.",
                    source="ours (docs/results/confounds.md)",
                    remedy="mithridate probe {shards} PROBE",
                )
            )
        return out

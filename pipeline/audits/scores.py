"""The tails of whatever scores are given: a group of pairs apart from all others is what a detector was made for.

Trade-off: knows nothing of the detectors; each is looked at alone, and one that is skewed on clean data has a tail.
Formula: pairs above Q3 + 3 IQR (Tukey 1977).
Source: Tukey, Exploratory Data Analysis, 1977; conclusions ours.
"""

from dataclasses import dataclass

from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Marks, Report
from pipeline.audits._tails import Spread, mark_tails, merged, report_tails, spreads

SAYS = "Detectors score suspicion: poisons that one finds are in its tail, and so are the oddest of the clean pairs."


@dataclass(frozen=True)
class scores:
    """Distribution and outlying tail of every score column (Tukey 1977)."""

    needs = ("scores",)

    def map(self, rows: Rows) -> dict[str, Spread]:
        return spreads(rows.scores)

    def merge(self, one: dict[str, Spread], other: dict[str, Spread]) -> dict[str, Spread]:
        return merged(one, other)

    def mark(self, rows: Rows, whole: dict[str, Spread]) -> Marks:
        return mark_tails(rows, rows.scores, whole)

    def report(self, whole: dict[str, Spread], marked: Marks, about: About) -> Report:
        return report_tails("scores", whole, marked, SAYS, "Tukey 1977 (outer fence)")

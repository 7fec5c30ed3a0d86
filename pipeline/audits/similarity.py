"""Pairs whose published similarity of image and text is far from all others', below or above.

Trade-off: who published it decides what it means, and datasets are cut by it: LAION starts at 0.28 or 0.3, so what is
lower came in another way. Poisons in a trained model's eyes need not stand out to the model that the curator asked.
Formula: the outer fences Q1 - 3 IQR and Q3 + 3 IQR (Tukey 1977) of the cosine as published.
Source: Schuhmann et al., NeurIPS 2022 (LAION's cut); Tukey 1977.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Marks, Report
from pipeline.audits._schema import Unseen
from pipeline.audits._tails import Spread, mark_tails, merged, report_tails, spreads

SAYS = "A caption that says what is printed in the image is far above, one that says something else far below."
LOW, HIGH = "minus similarity", "similarity"


@dataclass(frozen=True)
class similarity:
    """Outlying tails of the similarity that was published (Tukey 1977)."""

    needs = ("published_similarity",)

    def map(self, rows: Rows) -> dict[str, Spread]:
        return spreads(_both(rows))

    def merge(self, one: dict[str, Spread], other: dict[str, Spread]) -> dict[str, Spread]:
        return merged(one, other)

    def mark(self, rows: Rows, whole: dict[str, Spread]) -> Marks:
        return mark_tails(rows, _both(rows), whole)

    def report(self, whole: dict[str, Spread], marked: Marks, about: About) -> Report:
        if not whole[HIGH].n:
            remedy = (
                "img2dataset keeps it with --save_additional_columns; with embeddings, `score --detector clip_score`"
            )
            return Report(unseen=[Unseen("similarity", "no pair has a published similarity", remedy)])
        return report_tails("similarity", whole, marked, SAYS, "Tukey 1977; Schuhmann et al., NeurIPS 2022")


def _both(rows: Rows) -> dict[str, np.ndarray]:
    return {LOW: -rows.published_similarity, HIGH: rows.published_similarity}

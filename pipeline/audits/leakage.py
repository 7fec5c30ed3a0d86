"""Does a word in the caption show in the image's colours and sizes, before anybody looks at what it shows?

Trade-off: a linear classifier on a dozen numbers finds what is crude, and finding nothing says nothing about what a
network finds. A correlation is no fault of the data in itself: grass is green. It says what a model may take instead.
Formula: AUROC of an L2 logistic regression, five-fold, on balanced random pairs; interval of Hanley & McNeil (1982);
control: the same with the labels permuted, PERMUTATIONS times.
Source: Meister et al., ICCV 2023, "Gender Artifacts in Visual Datasets" (mean colours and resolution tell gender).
"""

import re
from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._captions import normalised, present
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Drawn, Found, Report, counted
from pipeline.audits._schema import Unseen
from pipeline.facts import NAMES
from pipeline.quality import quality

MOST = 5_000  # pairs with a word, and as many without; more make no interval narrower that matters
FEWEST = 50  # of each
FOLDS, PERMUTATIONS = 5, 20
WARNING = 0.6  # AUROC that the lower end of the interval exceeds: as in the confound probe
FAMILIES = {"colours": ("colour.",), "sizes": ("size.",), "colours and sizes": ("colour.", "size.")}


@dataclass(frozen=True)
class _Counts:
    named: int
    other: int
    with_word: Drawn
    without: Drawn


@dataclass(frozen=True)
class leakage:
    """How well mean colours and sizes tell pairs with a word from those without (Meister et al. 2023)."""

    words: tuple[str, ...] = ()

    needs = ("caption", "facts")

    def map(self, rows: Rows) -> _Counts:
        word = re.compile(r"\b(?:" + "|".join(re.escape(w.casefold()) for w in self.words) + r")\b")
        usable = present(rows.caption) & np.isfinite(rows.facts[:, _columns("size.")]).all(axis=1)
        named = np.asarray([bool(self.words and word.search(text)) for text in normalised(rows.caption)], bool)
        yes, no = usable & named, usable & ~named
        drawn = (Drawn.of(rows, ("uid", "facts"), MOST, which) for which in (yes, no))
        return _Counts(int(yes.sum()), int(no.sum()), *drawn)

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        drawn = one.with_word.merged(other.with_word), one.without.merged(other.without)
        return _Counts(one.named + other.named, one.other + other.other, *drawn)

    def report(self, merged: _Counts, marked: None, about: About) -> Report:
        if not self.words:
            return Report(
                unseen=[Unseen("leakage", "no attribute was chosen", "--attribute WORD …, e.g. woman she her")]
            )
        n = min(merged.named, merged.other, MOST)
        if n < FEWEST:
            why = f"{merged.named:,} usable pairs with {_listed(self.words)}, {merged.other:,} without"
            return Report(unseen=[Unseen("leakage", why, f"choose words that {FEWEST} captions have and {FEWEST} not")])
        facts = np.concatenate([d.columns["facts"][:n] for d in (merged.with_word, merged.without)])
        uids = np.concatenate([d.columns["uid"][:n] for d in (merged.with_word, merged.without)])
        labels = np.arange(2 * n) < n
        rows = [(family, *_auroc(facts[:, _columns(*of)], labels, uids)) for family, of in FAMILIES.items()]
        names = ("facts", "AUROC", "95% from", "to", "control: mean", "highest")
        table = pl.DataFrame(rows, names, orient="row")
        title = f"How well low-level facts tell pairs with {_listed(self.words)} (n = {n:,} of each)"
        out = Report(tables=[counted(table, "leakage", "auroc", title, dict(zip(names, names, strict=True)))])
        family, auroc, low, high, _, control = max(rows, key=lambda row: row[2])
        if low > max(control, 0.5):
            out.found.append(
                Found(
                    kind="attribute",
                    severity="warning" if low > WARNING else "note",
                    title=f"Pairs with {_listed(self.words)} can be told from others by {family} alone: AUROC "
                    f"{auroc:.2f} ({low:.2f}–{high:.2f}), at most {control:.2f} with permuted labels",
                    n=merged.named,
                    of=merged.named + merged.other,
                    explanation="A model can take the colours or the shape of the image for the attribute, and so can "
                    "a classifier that is trained to audit it; balancing the words does not take this away.",
                    source="Meister et al., ICCV 2023 (gender artifacts)",
                    remedy="mithridate audit {shards} OUT2 --attribute OTHER WORDS",
                )
            )
        return out


def _auroc(values: np.ndarray, labels: np.ndarray, uids: np.ndarray) -> tuple[float, float, float, float, float]:
    """AUROC with its 95% interval, and of permuted labels the mean and the highest."""
    told = quality(_out_of_fold(values, labels), uids, labels)
    shuffled = []
    for seed in range(PERMUTATIONS):
        mixed = np.random.default_rng(seed).permutation(labels)
        shuffled.append(float(quality(_out_of_fold(values, mixed), uids, mixed)["auroc"] or 0.5))
    auroc, low, high = (float(told[name] or 0.0) for name in ("auroc", "auroc_low", "auroc_high"))
    return auroc, low, high, float(np.mean(shuffled)), max(shuffled)


def _out_of_fold(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scores = np.zeros(len(labels))
    with threadpool_limits(1):  # of a dozen columns more of them only wait for each other
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(values, labels):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
            scores[test] = model.fit(values[train], labels[train]).decision_function(values[test])
    return scores


def _columns(*families: str) -> list[int]:
    return [i for i, name in enumerate(NAMES) if name.startswith(families)]


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join(map(repr, words[:3])) + (" …" if len(words) > 3 else "")

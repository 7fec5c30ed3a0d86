"""A second stage: what a cheap detector suspects is ordered anew by an expensive one.

Trade-off: the expensive detector runs on a share of the pairs, and finds nothing that the cheap one did not suspect.
Where the cut lies is estimated on the pool's own scores, so the share is met on average over the dataset and not
exactly; the decision about a pair hangs on the pair and the pool alone. Ties at the cut are broken by uid.
Source: cascades are folklore; VDC (Zhu et al. 2024) and cognitive distillation are published as first stages, at a
price that web-scale data cannot pay. Ours in this form.
"""

import hashlib
import pickle
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from filters._batch import Batch
from filters._learnt import learnt
from filters._wants import Wants
from pipeline import spec
from pipeline.draw import hash64


@dataclass(frozen=True)
class rerank:
    """The top `share` by a cheap detector, ordered by an expensive one that sees no others (ours)."""

    detector: Annotated[str, spec.SpecOf("detectors")]
    check: Annotated[str, spec.SpecOf("detectors")]
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError("share is that of the pairs to check: 0 < share < 1")
        _ = self._dear  # what is wrong with it is said now
        if self._cheap.__class__ is rerank:
            raise ValueError("the first stage of a rerank cannot be one; let its check be one")
        for part in (self._cheap, self._dear):
            if Wants.of(part).in_batch:
                raise ValueError(f"{spec.text(part)} compares pairs of one batch with each other, which a stage is not")
        if "poisoned" in self._cheap.needs:
            raise ValueError(
                "the first stage scores the pool, of which no ledger is asked; let the check be the oracle"
            )

    @cached_property
    def _cheap(self) -> Any:
        return spec.parse("detectors", self.detector)

    @cached_property
    def _dear(self) -> Any:
        return spec.parse("detectors", self.check)

    @cached_property
    def wants(self) -> Wants:
        """The cheap detector scores the pool itself, so all that it looks at is there too, be it the uids alone."""
        both = Wants.of(self._cheap, self._dear)
        return replace(both, pools=tuple(dict.fromkeys(("uid", *self._cheap.needs, *both.pools))))

    @property
    def needs(self) -> tuple[str, ...]:
        return self.wants.needs

    def summarize(self, batch: Batch) -> tuple[Any, Any]:
        cheap, dear = (part.summarize(batch) if Wants.of(part).whole else None for part in (self._cheap, self._dear))
        return cheap, dear

    def merge(self, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
        cheap, dear = (
            part.merge(a, b) if Wants.of(part).whole else None
            for part, a, b in zip((self._cheap, self._dear), one, other, strict=True)
        )
        return cheap, dear

    def score(self, batch: Batch, pool: Batch, summary: tuple[Any, Any] = (None, None)) -> np.ndarray:
        """Above 0 the checked pairs, by the check; from 0 down the rest, by the cheap detector."""
        first = _run(self._cheap, batch, pool, summary[0])
        told = hashlib.sha256(pickle.dumps(summary[0])).hexdigest()
        cut, lots = learnt(pool, (self, told), lambda: self._cut(pool, summary[0]))
        drawn = np.asarray([hash64(0, "rerank", who) / 2**64 for who in batch.uid])
        checked = np.flatnonzero((first > cut) | ((first == cut) & (drawn < lots)))
        scores = np.minimum(first - cut, 0)
        scores[np.isnan(first)] = np.nan
        if len(checked):
            scores[checked] = _positive(_run(self._dear, batch.take(checked), pool, summary[1]))
        return scores

    def _cut(self, pool: Batch, summary: Any) -> tuple[float, float]:
        """The score above which a pair is checked, and the probability of that for a pair with this very score."""
        scores = _run(self._cheap, pool, pool, summary)
        scores = scores[np.isfinite(scores)]
        cut = np.quantile(scores, 1 - self.share, method="inverted_cdf") if len(scores) else np.inf
        above, at = (scores > cut).sum(), max((scores == cut).sum(), 1)
        return float(cut), float((self.share * len(scores) - above) / at)


def _run(detector: Any, batch: Batch, pool: Batch, summary: Any) -> np.ndarray:
    """float32, as a score is stored: a cut between two scores must mean the same for both."""
    told = (summary,) if Wants.of(detector).whole else ()
    return np.asarray(detector.score(batch, pool, *told), np.float32).astype(np.float64)


def _positive(scores: np.ndarray) -> np.ndarray:
    """The same order above 0, whatever the scores: 1 + x, and below zero 1 / (1 - x)."""
    return np.where(scores >= 0, 1 + scores, 1 / (1 + np.abs(scores)))

"""A threshold with a false-removal rate that holds, learnt from pairs that are trusted to be clean.

The threshold is the ceil((n + 1)(1 - alpha))-th smallest score of n trusted pairs; what scores above it is dropped. Of
clean pairs that are exchangeable with the trusted ones at most alpha are dropped, on average over draws of the trusted
ones, for any detector and any n, ties or not (ties and unscored pairs only make it fewer).

Trusted pairs are named by uid and scored together with the others: the same model and the same pool. Scores of a
separate clean set would be of another pool and so not exchangeable; where the trusted set is another dataset, score
both as one list of shards. A detector with references in the batch is refused: trusted pairs would be each other's.
The rate is about clean pairs like the trusted ones; it promises nothing about poison.

Trade-off: n trusted pairs allow no alpha below 1 / (n + 1), and a trusted set that is unlike the rest of the data (more
curated, say) makes the rate on the rest another one.
Source: split conformal prediction (Vovk et al. 2005; Lei et al. 2018, section 2.2); for poison CASCADE (2608.04052).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from filters._wants import Wants
from pipeline import spec
from pipeline.errors import InputError
from pipeline.policies._select import Scores, column, ordered
from pipeline.shards.store import exists, view
from pipeline.spec import UNDRAWN


@dataclass(frozen=True)
class conformal:
    """Drop what scores above a threshold that drops at most a share alpha of clean pairs; `trusted`: a file of uids."""

    detector: str
    trusted: Annotated[str, UNDRAWN]
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError("alpha is a share: 0 < alpha < 1")

    @property
    def detectors(self) -> tuple[str, ...]:
        """Whose scores it reads."""
        return (self.detector,)

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> int:
        """The threshold, in the order of `ordered`."""
        trusted = self._trusted()
        rows = ((scores, np.asarray([uid in trusted for uid in scores["uid"]], bool)) for scores in passes())
        found = [ordered(scores[self._column(scores)][here]) for scores, here in rows]
        values = np.sort(np.concatenate([*found, np.empty(0, np.uint64)]))
        if len(values) > len(trusted):
            raise InputError(
                f"{self.trusted}: {len(values):,} pairs have its {len(trusted):,} uids; some are not trusted"
            )
        rank = math.ceil((len(values) + 1) * (1 - self.alpha) - 1e-9)  # 0.9 * 10 may be 9.000…2
        if rank > len(values):
            raise InputError(
                f"{self.trusted}: {len(values):,} of its {len(trusted):,} uids are among the scores; alpha "
                f"{self.alpha} needs at least {math.ceil(1 / self.alpha - 1e-9) - 1:,}"
            )
        return int(values[rank - 1])

    def _column(self, scores: Scores) -> str:
        name = column(scores, self.detector)
        try:
            detector = spec.parse("detectors", name.partition(":")[2])
        except InputError:  # scores of somebody's own
            return name
        if Wants.of(detector).in_batch:
            raise InputError(f"{name} scores trusted pairs by their own company, and the others by theirs")
        return name

    def drops(self, scores: Scores, fitted: int) -> np.ndarray:
        """bool[n]"""
        return ordered(scores[column(scores, self.detector)]) > fitted

    def _trusted(self) -> set[str]:
        if not exists(self.trusted):
            raise InputError(f"{self.trusted}: no such file; write the uids of trusted clean pairs, one a line")
        try:
            found = set(bytes(view(self.trusted)).decode().split())
        except UnicodeDecodeError as error:
            raise InputError(f"{self.trusted}: not a text file of uids, one a line") from error
        if "uid" in found:
            raise InputError(
                f"{self.trusted}: it has a header; write the uids of trusted clean pairs alone, one a line"
            )
        return found

"""Is the pair on a list that someone made: an audit's finding, a reviewer's selection?

Trade-off: knows nothing itself; it lets a list go the way of every other score (policies, quarantine, keep-lists) and
stay on record with its file. With `keep` a list of duplicates leaves so many of each group, those with the least uids.
Source: ours.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np

from filters._batch import Batch
from pipeline.spec import UNDRAWN


@dataclass(frozen=True)
class listed:
    """1 for a pair whose uid is in the column `uid` of a parquet file, 0 for others (ours)."""

    file: Annotated[str, UNDRAWN]
    keep: int = 0

    needs = ("uid",)

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError("keep is a number of pairs of each group, not below 0")
        # workers have another working directory
        object.__setattr__(self, "file", self.file if "://" in self.file else str(Path(self.file).absolute()))

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        unwanted = _unwanted(self.file, self.keep)
        return np.asarray([who in unwanted for who in batch.uid], np.float64)


@lru_cache(maxsize=4)
def _unwanted(file: str, keep: int) -> frozenset[str]:
    from pipeline import sidecars

    columns = ("uid", "group") if keep else ("uid",)
    table = sidecars.read(file, columns, "`mithridate audit` writes such lists to its OUT/findings", hostile=True)
    who = table.column("uid").to_pylist()
    if not keep:
        return frozenset(who)
    left: dict[str, int] = {}
    unwanted: set[str] = set()
    for uid, group in sorted(zip(who, table.column("group").to_pylist(), strict=True)):
        left[group] = left.get(group, 0) + 1
        if left[group] > keep:
            unwanted.add(uid)
    return frozenset(unwanted)

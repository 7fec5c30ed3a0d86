"""Is the pair on a list that someone made: an audit's finding, a reviewer's selection in its report?

Trade-off: knows nothing itself; it lets a list go the way of every other score (policies, quarantine, keep-lists) and
stay on record with its file. A list is parquet, or csv where its name ends so: people can edit that, and damage it.
With `keep` a list of duplicates leaves so many of each group, those with the least uids.
Source: ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from filters._batch import Batch
from pipeline.spec import UNDRAWN


@dataclass(frozen=True)
class listed:
    """1 for a pair whose uid is in the column `uid` of a parquet or csv file, 0 for others (ours)."""

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


def unwanted(who: Iterable[str], groups: Iterable[str], keep: int) -> frozenset[str]:
    """Of the pairs of a list those that go where `keep` of each group stay."""
    left: dict[str, int] = {}
    out: set[str] = set()
    for uid, group in sorted(zip(who, groups, strict=True)):
        left[group] = left.get(group, 0) + 1
        if left[group] > keep:
            out.add(uid)
    return frozenset(out)


@lru_cache(maxsize=4)
def _unwanted(file: str, keep: int) -> frozenset[str]:
    table = _read(file, ("uid", "group") if keep else ("uid",))
    who = table.column("uid").to_pylist()
    return unwanted(who, table.column("group").to_pylist(), keep) if keep else frozenset(who)


def _read(file: str, columns: tuple[str, ...]) -> Any:
    """The list as a pyarrow table."""
    from pipeline import sidecars

    if not file.endswith(".csv"):
        return sidecars.read(file, columns, "`mithridate audit` writes such lists to its OUT/findings", hostile=True)
    return _read_csv(file, columns)


def _read_csv(file: str, columns: tuple[str, ...]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    from pipeline.errors import InputError
    from pipeline.shards.store import exists, view

    if not exists(file):
        raise InputError(f"{file}: no such file; the report of `mithridate audit` makes such lists")
    options = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=list(columns))
    try:
        table = csv.read_csv(pa.BufferReader(pa.py_buffer(view(file))), convert_options=options)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file}: no csv with a column {' and a column '.join(columns)} ({error})") from error
    wrong = table.filter(pc.invert(pc.match_substring_regex(table.column("uid"), "^[0-9a-f]{32}$")))
    if len(wrong):
        shown = repr(wrong.column("uid")[0].as_py())
        raise InputError(f"{file}: {shown} is no uid (32 hex digits); did a spreadsheet write the file anew?")
    return table

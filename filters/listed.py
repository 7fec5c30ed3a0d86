"""Is the pair on a list that someone made: an audit's finding, a reviewer's selection in its report?

Trade-off: knows nothing itself; it lets a list go the way of every other score (policies, quarantine, keep-lists) and
stay on record with its file. A list is parquet, or csv where its name ends so: people can edit that, and damage it.
With `keep` a list of duplicates leaves so many of each group. Several lists are decided together, because each alone
may take the very pair that another one left of its group.
Source: ours.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from filters._batch import Batch
from pipeline.shards.store import exists, stamp
from pipeline.spec import UNDRAWN


@dataclass(frozen=True)
class listed:
    """1 for a pair whose uid is in the column `uid` of a parquet or csv file, or of several, 0 for others (ours)."""

    file: Annotated[str | tuple[str, ...], UNDRAWN]
    keep: int | tuple[int, ...] = 0

    needs = ("uid",)

    def __post_init__(self) -> None:
        several = isinstance(self.file, tuple)
        if several != isinstance(self.keep, tuple) or (several and len(self.file) != len(self.keeps)):
            raise ValueError("several files need as many numbers to keep: file=('a.csv', 'b.parquet'), keep=(0, 1)")
        if min(self.keeps, default=0) < 0:
            raise ValueError("keep is a number of pairs of each group, not below 0")
        # workers have another working directory
        whole = tuple(path if "://" in path else str(Path(path).absolute()) for path in self.files)
        object.__setattr__(self, "file", whole if several else whole[0])

    @property
    def files(self) -> tuple[str, ...]:
        return self.file if isinstance(self.file, tuple) else (self.file,)

    @property
    def keeps(self) -> tuple[int, ...]:
        """Of each file."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        state = str([stamp(file) for file in self.files if exists(file)])
        unwanted = _unwanted(self.files, self.keeps, state)
        return np.asarray([who in unwanted for who in batch.uid], np.float64)


class List(NamedTuple):
    """Pairs, the group of each (of no use where none is kept), and how many of each group stay."""

    uids: Iterable[str]
    groups: Iterable[str]
    keep: int


def unwanted(lists: Sequence[List]) -> Collection[str]:
    """The pairs that go. Of each group of each list `keep` stay, as far as no list that keeps none takes them.

    The greatest uids go first, each as long as no group of any list would have too few left.
    """
    gone = {uid for one in lists if not one.keep for uid in one.uids}
    of: dict[str, set[tuple[int, str]]] = {}  # the groups of a pair: number of the list, group
    for number, one in enumerate(lists):
        for uid, group in zip(one.uids, one.groups, strict=True) if one.keep else ():
            of.setdefault(uid, set()).add((number, group))
    left = Counter(group for uid, groups in of.items() if uid not in gone for group in groups)
    for uid in sorted(of.keys() - gone, reverse=True):
        if all(left[group] > lists[group[0]].keep for group in of[uid]):
            gone.add(uid)
            left.subtract(of[uid])
    return gone


@lru_cache(maxsize=4)
def _unwanted(files: tuple[str, ...], keeps: tuple[int, ...], state: str) -> Collection[str]:
    """`state` of the files: of what has been rewritten since, nothing is remembered."""
    lists = []
    for file, keep in zip(files, keeps, strict=True):
        table = _read(file, ("uid", "group") if keep else ("uid",))
        groups = table.column("group").to_pylist() if keep else ()
        lists.append(List(table.column("uid").to_pylist(), groups, keep))
    return unwanted(lists)


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

"""What an audit is: a map over shards, a merge, and a report of the whole; nothing else of a run is known to it.

An audit is a frozen dataclass with `needs`, columns of `pipeline.audit_columns.Rows` without which it cannot look;
`map(rows) -> S`, small beside the shard; `merge(S, S) -> S`; and `report(merged, marks, about) -> Report`.
Optional is `mark(rows, merged) -> Marks`, a second look that knows the whole and names pairs: their groups are complete
when `report` gets the marks of all shards. So a dataset of any size is counted in a small sketch first, and only what
may be a finding is counted exactly. `empty() -> S` is for an audit that has something to say where there is no pair.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from filters._sketch import hashed, mixed
from pipeline.audit_columns import Rows
from pipeline.audits._schema import Histogram, Severity, Table, Unseen
from pipeline.dataset import Row

CAPTION = 240  # characters of a caption that an example keeps
LISTED = 200  # rows of a table

Marks = pl.DataFrame  # uid, shard, kind, group, caption; what else an audit wants to find again


@dataclass(frozen=True)
class About:
    """The run: pairs and sha256 by shard that was read, why others failed, what the folders' manifest.parquet say, and
    the job that made the shards, by shard, where there is one. `unrecorded` shards have no manifest beside them.
    `lost`: rows that are no pairs, by why; `unusable`: values that count as missing, by "column: why"."""

    pairs: Mapping[str, int]
    sha256: Mapping[str, str]
    failed: Mapping[str, str]
    recorded: Sequence[Row]
    made_by: Mapping[str, Mapping[str, Any]]
    images: bool
    unrecorded: frozenset[str] = frozenset()
    lost: Mapping[str, int] = field(default_factory=dict)
    unusable: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A finding before it has a file: `members` (uid, shard, group, caption, reason), the worst groups first.

    `remedy` is a command with {shards} left open; None: the one that removes the members, of which `keep` of each group
    stay.
    """

    kind: str
    severity: Severity
    title: str
    n: int
    of: int
    explanation: str
    source: str
    members: pl.DataFrame | None = None
    remedy: str | None = None
    keep: int = 0


@dataclass
class Report:
    """What an audit found; `unseen` what it could not look at after all."""

    found: list[Found] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)


def marks(rows: Rows, at: np.ndarray, kind: str, group: Iterable[str], **more: Any) -> Marks:
    """Name the pairs `at` int[n] of a shard, each with its group."""
    captions = rows.caption[at] if len(rows.caption) else [None] * len(at)
    return pl.DataFrame(
        {
            "uid": pl.Series(rows.uid[at], dtype=pl.String),
            "shard": pl.Series([rows.shard] * len(at), dtype=pl.String),
            "kind": pl.Series([kind] * len(at), dtype=pl.String),
            "group": pl.Series(map(_named, group), dtype=pl.String),
            "caption": pl.Series([text and text[:CAPTION] for text in captions], dtype=pl.String),
            **more,
        }
    )


def _named(group: str) -> str:
    """A long one (a caption may be a page) cut, with what tells it from others that begin so."""
    if len(group) <= CAPTION:
        return group
    return f"{group[:CAPTION]}… {hashlib.sha256(group.encode(errors='replace')).hexdigest()[:12]}"


def groups(marked: Marks, kind: str, least: float) -> pl.DataFrame:
    """The marks of a kind whose groups have at least so many pairs, with their `size`; the largest first."""
    sized = marked.filter(pl.col("kind") == kind).with_columns(size=pl.len().over("group"))
    return sized.filter(pl.col("size") >= least).sort("size", "group", "uid", descending=[True, False, False])


def reasoned(members: pl.DataFrame, reason: pl.Expr) -> pl.DataFrame:
    """With a reason a row."""
    return members.with_columns(reason=reason.cast(pl.String))


def short(text: str, most: int = 60) -> str:
    """For a title."""
    return text if len(text) <= most else text[: most - 1] + "…"


def many(n: int, what: str) -> str:
    """ "1 caption", "20 captions"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def counted(frame: pl.DataFrame, audit: str, name: str, title: str, columns: Mapping[str, str]) -> Table:
    """The first rows of a frame as a table; `columns` maps its columns to their headings."""
    shown = frame.head(LISTED).select(columns.keys())
    rows = tuple(tuple(_plain(cell) for cell in row) for row in shown.iter_rows())
    return Table(audit, name, title, tuple(columns.values()), rows, frame.height)


def _plain(cell: Any) -> Any:
    return None if isinstance(cell, float) and not np.isfinite(cell) else cell


@dataclass(frozen=True)
class Drawn:
    """At most `most` random pairs of the dataset, the same however it is sharded: those with the smallest hashes."""

    hashes: np.ndarray
    columns: Mapping[str, np.ndarray]
    most: int

    @classmethod
    def of(cls, rows: Rows, names: Sequence[str], most: int, usable: np.ndarray | None = None) -> "Drawn":
        """Of a shard, and of these only `usable` bool[n] ones."""
        at = np.arange(len(rows)) if usable is None else np.flatnonzero(usable)
        hashes = mixed(hashed(rows.uid[at].tolist())) if len(at) else np.empty(0, np.uint64)
        best = np.argsort(hashes, kind="stable")[:most]
        return cls(hashes[best], {name: getattr(rows, name)[at[best]] for name in names}, most)

    def merged(self, other: "Drawn") -> "Drawn":
        hashes = np.concatenate([self.hashes, other.hashes])
        best = np.argsort(hashes, kind="stable")[: self.most]
        both = {name: np.concatenate([one, other.columns[name]])[best] for name, one in self.columns.items()}
        return Drawn(hashes[best], both, self.most)

    def __len__(self) -> int:
        return len(self.hashes)

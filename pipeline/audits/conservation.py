"""Is every shard whole, and every pair there once: what could not be read, what is missing, what is there twice.

Trade-off: what a manifest or a marker beside the shards says is believed as far as it agrees with the bytes; without
them nobody knows how many pairs there should be. A forged manifest passes here; `mithridate verify --sha256` is for it.
Formula: in = out + dropped + failed of the job that wrote a shard; sha256 of shards against manifest.parquet.
Source: ours (docs/design.md, promises 2 and 3).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from filters._captions import present
from filters._sketch import hashed
from pipeline.audit_columns import Rows
from pipeline.audits._audit import About, Found, Marks, Report, counted, groups, many, marks, reasoned, short
from pipeline.audits._schema import Severity, Unseen

MOST = 10_000_000  # pairs whose uids are compared: 8 bytes of the driver's memory each
WARNING = 0.01  # of all pairs without a usable image or caption: more than what resizing and downloads commonly damage
SEVERE = 0.5  # most of the dataset was not looked at, or its columns are called otherwise
CHECK = "mithridate verify {shards}"


@dataclass(frozen=True)
class _Counts:
    """`shards`: name, pairs, with a caption, with an image. `uids`: uint64, sorted; None where there are too many."""

    shards: tuple[tuple[str, int, int, int], ...]
    uids: np.ndarray | None


@dataclass(frozen=True)
class conservation:
    """Shards and pairs that are unreadable, changed, missing, empty or there twice."""

    needs = ("uid",)

    def empty(self) -> _Counts:
        """Where no shard has a pair, there is still something to say of the shards."""
        return _Counts((), np.empty(0, np.uint64))

    def map(self, rows: Rows) -> _Counts:
        usable = int(rows.decoded.sum()) if len(rows.decoded) else 0
        seen = (rows.shard, len(rows), int(present(rows.caption).sum()), usable)
        return _Counts((seen,), np.sort(hashed(rows.uid.tolist())))

    def merge(self, one: _Counts, other: _Counts) -> _Counts:
        uids = None
        if one.uids is not None and other.uids is not None and len(one.uids) + len(other.uids) <= MOST:
            uids = np.sort(np.concatenate([one.uids, other.uids]), kind="stable")
        return _Counts((*one.shards, *other.shards), uids)

    def mark(self, rows: Rows, merged: _Counts) -> Marks:
        parts = [self._without(rows, "no_caption", ~present(rows.caption), "no caption")]
        if len(rows.decoded):
            parts.append(self._without(rows, "no_image", ~rows.decoded, "no usable image"))
        if merged.uids is not None:
            own = hashed(rows.uid.tolist())
            times = [np.searchsorted(merged.uids, own, side) for side in ("left", "right")]
            at = np.flatnonzero(times[1] - times[0] > 1)
            parts.append(marks(rows, at, "repeated", rows.uid[at]))
        return pl.concat(parts)

    @staticmethod
    def _without(rows: Rows, kind: str, mask: np.ndarray, group: str) -> Marks:
        at = np.flatnonzero(mask)
        return marks(rows, at, kind, [group] * len(at))

    def report(self, merged: _Counts, marked: Marks | None, about: About) -> Report:
        out = Report(found=[*_of_shards(about), *_of_rows(about)])
        n = sum(about.pairs.values())
        if marked is None:
            return out
        if merged.uids is None:
            remedy = "`mithridate verify SHARDS` compares every sample with the manifest"
            out.unseen.append(Unseen("conservation", f"more than {MOST:,} pairs: uids were not compared", remedy))
        table = pl.DataFrame(merged.shards, ["shard", "pairs", "captions", "images"], orient="row")
        columns = {"shard": "shard", "pairs": "pairs", "captions": "with a caption"}
        columns |= {"images": "with a usable image"} if about.images else {}
        table = table.with_columns(least=pl.min_horizontal("captions", "images") / pl.col("pairs"))
        table = table.sort("least", "shard", nulls_last=True)
        out.tables.append(counted(table, "conservation", "shards", "Shards, the most damaged first", columns))
        for kind, what in (("no_caption", "no caption"), ("no_image", "no usable image")):
            found = groups(marked, kind, 1)
            if found.height:
                severity: Severity = "warning" if found.height > WARNING * n else "note"
                if found.height > SEVERE * n:
                    severity = "severe"
                why = "Such pairs teach nothing, and jobs count them as failed. Where one shard has most of them, its "
                why += "download or its disk is at fault."
                reason = reasoned(found, pl.lit(f"it has {what}"))
                title = f"{found.height:,} of {many(n, 'pair')} {'have' if found.height > 1 else 'has'} {what}"
                out.found.append(
                    Found(
                        kind=kind,
                        severity=severity,
                        title=title,
                        n=found.height,
                        of=n,
                        explanation=why,
                        source="ours",
                        members=reason,
                    )
                )
        repeated = groups(marked, "repeated", 2)
        if repeated.height:
            clashing = many(repeated["group"].n_unique(), "uid")
            out.found.append(
                Found(
                    kind="repeated",
                    severity="severe" if about.images else "warning",
                    title=f"{repeated.height:,} pairs share a uid with another: {clashing} in all",
                    n=repeated.height,
                    of=n,
                    explanation="Everything is joined by uid: scores, ledgers and keep-lists of one pair hold for the "
                    "other too. Keys that repeat from shard to shard do this, and rows that were merged twice.",
                    source="ours",
                    members=reasoned(repeated, pl.format("{} pairs have this uid", "size")),
                    remedy="mithridate audit {shards} OUT2 --uid shard/key" if about.images else None,
                )
            )
        return out


def _of_shards(about: About) -> list[Found]:
    """What is wrong with whole shards; `n` and `of` count shards."""
    recorded = {row.shard: row for row in about.recorded}
    changed = [name for name, sha in about.sha256.items() if name in recorded and recorded[name].sha256 != sha]
    known = {*about.sha256, *about.failed}
    missing = [name for name in recorded if name not in known]
    extra = [name for name in about.sha256 if recorded and name not in recorded and name not in about.unrecorded]
    leaking = [
        name
        for name, marker in about.made_by.items()
        if marker["out"] != about.pairs[name] or marker["read"] != marker["out"] + marker["dropped"] + marker["failed"]
    ]
    failed = [short(why, 160) for why in about.failed.values()]
    empty = [name for name, pairs in about.pairs.items() if not pairs]
    all_of, found = len(known | set(missing)), []
    kinds: tuple[tuple[str, Sequence[str], Severity, str, str], ...] = (
        ("unreadable", failed, "severe", "cannot be read", "They were not audited, and every job stumbles here."),
        ("changed", changed, "severe", "are not what manifest.parquet records", "Somebody or something wrote to them."),
        ("missing", missing, "severe", "are in manifest.parquet and not here", "Part of the dataset is not looked at."),
        ("extra", extra, "severe", "are here and not in manifest.parquet", "Somebody added to the dataset."),
        ("leaking", leaking, "severe", "do not hold what their marker says", "Pairs were lost or added."),
        ("empty", empty, "note", "have no pairs", "A filter may have dropped all of them, or a download failed."),
    )
    for kind, names, severity, what, why in kinds:
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            title = f"{len(names):,} of {all_of:,} shards {what}: {listed}"
            found.append(
                Found(
                    kind=kind,
                    severity=severity,
                    title=title,
                    n=len(names),
                    of=all_of,
                    explanation=why,
                    source="ours",
                    remedy=CHECK,
                )
            )
    return found


def _of_rows(about: About) -> Iterator[Found]:
    """Rows of which no pair came, and values that count as missing."""
    pairs = sum(about.pairs.values())
    lost, unusable = sum(about.lost.values()), sum(about.unusable.values())
    if lost:
        yield Found(
            kind="lost",
            severity="severe" if lost > WARNING * (pairs + lost) else "warning",
            title=f"{lost:,} of {many(pairs + lost, 'row')} are no pairs that could be looked at: {_most(about.lost)}",
            n=lost,
            of=pairs + lost,
            explanation="What no audit reads, no gate stops: a row with a broken quote is hidden from all of them, and "
            "another reader may take it for a pair.",
            source="ours",
            remedy="# mend these rows, or leave them out of the table",
        )
    if unusable:
        yield Found(
            kind="unusable",
            severity="warning" if unusable > WARNING * pairs else "note",
            title=f"{many(unusable, 'value')} cannot be used and count as missing: {_most(about.unusable)}",
            n=min(unusable, pairs),
            of=pairs,
            explanation="A column of another type, or out of its range, is as good as none to whoever needs it.",
            source="ours",
            remedy="# write the column in the type that docs/formats.md gives",
        )


def _most(reasons: Mapping[str, int]) -> str:
    first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rest = f", and {len(first) - 3:,} kinds more" if len(first) > 3 else ""
    return "; ".join(f"{short(why, 100)} ({n:,})" for why, n in first[:3]) + rest

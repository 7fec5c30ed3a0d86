"""An audit as one HTML page: the verdict, the findings with pictures, the commands that act on them.

The page is whole without its script, which sorts, pages and makes lists. Trade-off: what it holds is bounded (some
pictures and a table's first rows of each finding, uids up to a number), so that a million pairs open as fast as a
thousand; whatever is cut says so and names the file that has the whole.
"""

import base64
import dataclasses
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.audits._schema import SEVERITIES, Audited, Finding, Histogram, Table
from pipeline.report import charts, data_url, page
from pipeline.report.text import one_line

if TYPE_CHECKING:
    from markupsafe import Markup

    from pipeline.audit_nearest import Near

ALIKE = 8  # others of a pair's group
NAMED = {"severe": "Severe", "warning": "Warnings", "note": "Notes"}
MEANS = {
    "severe": "Look before this data is released or trained on.",
    "warning": "Likely harmless in part; worth a decision.",
    "note": "How the data is; nothing needs to be done.",
}


@dataclass(frozen=True)
class Known:
    """What is known of a pair besides its findings. `picture` is a WebP and whether it is exact; `before` its row of
    the ledger where it is a poison."""

    picture: tuple[bytes, bool] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    before: Mapping[str, Any] | None = None
    nearest: Sequence["Near"] = ()


@dataclass(frozen=True)
class Pair:
    """A pair that a finding names; `size` pairs are in its group."""

    uid: str
    shard: str
    group: str
    size: int
    caption: str | None
    reason: str
    known: Known = Known()


@dataclass(frozen=True)
class Members:
    """The pairs of a finding: `tiles` with pictures, the first rows as a table, of `groups`.

    `removes` pairs are what its command removes, so that `keep` of each group stay. `listed` are the uids of the list,
    16 bytes each, None where these are too many for a page; where some stay group after group, of `sizes` pairs. `file`
    is the list's path; "" where the finding is not one to be removed.
    """

    tiles: Sequence[Pair] = ()
    rows: Sequence[Pair] = ()
    groups: int = 0
    removes: int = 0
    listed: bytes | None = None
    sizes: Sequence[int] = ()
    keep: int = 0
    file: str = ""


@dataclass(frozen=True)
class Selection:
    """The commands for a list that is made in the page and saved as `file`: `score`, which lacks --detector, writes
    `path`, whose last part is `folder`; `filter` lacks --scores and --policy."""

    file: str
    score: str
    path: str
    folder: str
    filter: str


def render_audit(
    audited: Audited,
    members: Mapping[str, Members],
    reasons: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    selection: Selection,
    version: str,
) -> str:
    """The page. `members` are by AUDIT-KIND; `reasons` tell in which findings a (shard, uid) is, and why."""
    names = {finding.name for finding in audited.findings}
    bare = {f.audit: f.name for f in reversed(audited.findings) if not f.file}  # whose tables are all it has
    tables = [(bare.get(t.audit), _table(t, number)) for number, t in enumerate(audited.tables, 1) if t.rows]
    drawn = [
        (name if (name := f"{one.audit}-{one.kind}") in names else None, _chart(one)) for one in audited.histograms
    ]
    whole = _Whole(
        reasons,
        {finding.name: finding.title for finding in audited.findings},
        {one.name: one for one in audited.histograms if one.audit == "scores"},
        {
            (pair.shard, pair.uid): _anchor(finding.name, at)
            for finding in reversed(audited.findings)
            for at, pair in enumerate(members.get(finding.name, Members()).tiles)
        },
    )
    findings = [
        _finding(f, members.get(f.name, Members()), whole)
        | {
            "charts": _of(drawn, f.name),
            "tables": _of(tables, f.name),
            "see": [table for table in _of(tables, None) if table["audit"] == f.audit],
        }
        for f in audited.findings
    ]
    data = audited.dataset
    blind = {one.audit for one in audited.unseen}
    return page(
        "audit.html",
        ("style.css", "audit.css"),
        "audit.js",
        title=f"Audit of {one_line(data.where.rstrip('/').rpartition('/')[2] or data.where, 80)}",
        verdict=audited.verdict,
        facts={
            "Pairs": f"{data.pairs:,}",
            "Shards" if data.kind == "shards" else "Tables": f"{data.shards:,}"
            + (f", {data.failed:,} unreadable" if data.failed else ""),
            "Audits that saw everything": f"{len(audited.audits) - len(blind)} of {len(audited.audits)}",
            "Digest": data.sha256,
            "Made by": version,
            "Data": data.where,
        },
        levels=[
            (level, NAMED[level], MEANS[level], [f for f in findings if f["severity"] == level]) for level in SEVERITIES
        ],
        findings=findings,
        charts=_of(drawn, None),
        tables=_of(tables, None),
        unseen=audited.unseen,
        selection=selection,
        lists=_json({name: _list(one) for name, one in members.items() if one.file}),
        commands=_json(dataclasses.asdict(selection)),
    )


def _list(members: Members) -> dict[str, Any]:
    """`file` is a literal of a spec."""
    listed = None if members.listed is None else base64.b64encode(members.listed).decode()
    return {"listed": listed, "sizes": members.sizes, "keep": members.keep, "file": repr(members.file)}


@dataclass(frozen=True)
class _Whole:
    """What pairs are told against: reasons by (shard, uid), titles by finding, the distribution of each score, and
    where on the page a (shard, uid) is shown first."""

    reasons: Mapping[tuple[str, str], Sequence[tuple[str, str]]]
    titles: Mapping[str, str]
    spreads: Mapping[str, Histogram]
    anchors: Mapping[tuple[str, str], str]


def _of(owned: Sequence[tuple[str | None, Any]], owner: str | None) -> list[Any]:
    return [what for name, what in owned if name == owner]


def _chart(one: Histogram) -> charts.Tail:
    return charts.tail(one.title, one.edges, one.counts, one.n, one.fence)


def _finding(finding: Finding, members: Members, whole: _Whole) -> dict[str, Any]:
    name, share = finding.name, finding.share
    unit = "shards" if finding.audit == "conservation" and not finding.file else "pairs"
    groups = {group: number for number, group in enumerate(dict.fromkeys(p.group for p in members.rows), 1)}
    return {
        "name": name,
        "audit": finding.audit,
        "severity": finding.severity,
        "title": one_line(finding.title, 400),
        "n": f"{finding.n:,}",
        "unit": unit if finding.n != 1 else unit[:-1],
        "share": _percent(share.value),
        "interval": f"{_percent(share.low)}–{_percent(share.high)}" if share.low is not None else "",
        "of": f"{share.n:,}",
        "explanation": finding.explanation,
        "source": finding.source,
        "action": _in_lines(finding.action),
        "removes": members.removes if members.file else 0,
        "stays": 0 < members.removes < finding.n,
        "whole": members.listed is not None,
        "file": finding.file,
        "tiles": [_tile(at, name, groups, members, whole) for at in range(len(members.tiles))],
        "rows": [
            (p.uid, p.shard, groups[p.group], one_line(p.caption or ""), one_line(p.reason)) for p in members.rows
        ],
        "groups": members.groups,
    }


def _tile(at: int, finding: str, groups: Mapping[str, int], members: Members, whole: _Whole) -> dict[str, Any]:
    pair = members.tiles[at]
    known, before = pair.known, pair.known.before
    return {
        "id": _anchor(finding, at),
        "uid": pair.uid,
        "source": known.picture and data_url(known.picture[0]),
        "exact": known.picture and known.picture[1],
        "caption": one_line(pair.caption or ""),
        "reason": one_line(pair.reason),
        "group": groups[pair.group] if members.groups > 1 else 0,
        "size": pair.size,
        "alike": [
            (_anchor(finding, other), one_line(members.tiles[other].caption or "(no caption)", 60))
            for other in _alike(at, members)
        ],
        "nearest": [
            (
                f"{one.similarity:.3f}",
                one.uid,
                one.shard,
                one_line(one.caption),
                whole.anchors.get((one.shard, one.uid)),
            )
            for one in known.nearest
        ],
        "why": [
            (name, whole.titles[name], one_line(why)) for name, why in whole.reasons.get((pair.shard, pair.uid), ())
        ],
        "scores": [
            (name, _cell(score), _place(score, whole.spreads.get(name))) for name, score in known.scores.items()
        ],
        "facts": {"uid": pair.uid, "shard": pair.shard, "group": one_line(pair.group, 120), **known.facts},
        "before": before and {name: one_line(str(value or "")) for name, value in before.items()},
        "other_image": before and before.get("image_sha256_before") != before.get("image_sha256_after"),
    }


def _in_lines(command: str) -> str:
    """A shell's command with its long options on lines of their own; what is quoted stays."""
    parts = re.split(r"""("[^"]*"|'[^']*')""", command)
    parts[::2] = [part.replace(" && ", " &&\n").replace(" --", " \\\n    --") for part in parts[::2]]
    return "".join(parts)


def _alike(at: int, members: Members) -> list[int]:
    """The tiles of its group that are next to it in the group's order."""
    group = [number for number, p in enumerate(members.tiles) if p.group == members.tiles[at].group]
    place = group.index(at)
    first = max(0, min(place - ALIKE // 2, len(group) - ALIKE - 1))
    return [number for number in group[first : first + ALIKE + 1] if number != at]


def _place(score: float, spread: Histogram | None) -> str:
    """Where a score lies among all, as far as the bins tell."""
    if spread is None or score != score:
        return ""
    at = max(0, bisect_right(spread.edges, score) - 1)
    share = f"{_percent(sum(spread.counts[at:]) / spread.n)} or fewer score as high"
    beyond = spread.fence is not None and score > spread.fence
    return f"above the fence of {spread.fence:.4g}; {share}" if beyond else share


def _anchor(finding: str, at: int) -> str:
    """Of a number and not of a shard's name, which may hold anything: a link to `a%zz` cannot be decoded."""
    return f"{finding}-tile-{at + 1}"


def _table(table: Table, number: int) -> dict[str, Any]:
    numeric = [all(isinstance(row[i], int | float | None) for row in table.rows) for i in range(len(table.columns))]
    return {
        "id": f"table-{number}",
        "title": table.title,
        "audit": table.audit,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": [
            [(_cell(cell), cell, is_number) for cell, is_number in zip(row, numeric, strict=True)] for row in table.rows
        ],
        "total": table.total,
    }


def _cell(cell: str | int | float | None) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}".replace("-", "−")
    return f"{cell:,}" if isinstance(cell, int) else one_line(cell, 120)


def _percent(value: float | None) -> str:
    """With as many digits as tell it from nothing."""
    if value is None:
        return "–"
    percent = 100 * value
    return f"{percent:.1f}%" if percent >= 1 or not percent else f"{percent:.2g}%"


def _json(value: Any) -> "Markup":
    """For a data block: nothing in it can end the block."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704

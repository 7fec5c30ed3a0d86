"""What is different between two audits: this month's crawl and last month's, a dataset before and after a filter.

Trade-off: a finding is known by its audit and kind, so what grew within one (another flood beside the old one) is told
by the tables only. The intervals take the two for independent samples; where B is a part of A they are too wide.
"""

from collections.abc import Sequence

from pipeline.audits._audit import many
from pipeline.audits._markdown import MARKS, plain
from pipeline.audits._schema import Audited, Cell, Finding, Table
from pipeline.errors import InputError
from pipeline.shards.store import is_folder, join, view
from train.metrics import newcombe

FILE = "audit.json"
ROWS = 10  # of a table
ORDER = ("new", "larger", "about the same", "smaller", "gone")


def compare_audits(before: str, after: str) -> str:
    """Findings that are new, larger, smaller or gone, and the tables side by side, as Markdown."""
    a, b = _read(before), _read(after)
    lines = [
        f"# {MARKS[a.verdict.worst]} → {MARKS[b.verdict.worst]} Audits compared",
        "",
        "| | A | B |",
        "|---|---|---|",
    ]
    for name, one, two in (
        ("data", plain(a.dataset.where), plain(b.dataset.where)),
        ("pairs", f"{a.dataset.pairs:,}", f"{b.dataset.pairs:,}"),
        ("digest", plain(a.dataset.sha256), plain(b.dataset.sha256)),
        ("verdict", _counts(a), _counts(b)),
        ("not looked at", _unseen(a), _unseen(b)),
    ):
        lines.append(f"| {name} | {one} | {two} |")
    if a.dataset.sha256 == b.dataset.sha256:
        lines += ["", "Both are of the same data."]
    lines += ["", *_findings(a, b)]
    for table in a.tables:
        other = next((t for t in b.tables if (t.audit, t.name) == (table.audit, table.name)), None)
        if other and other.columns == table.columns and (table.rows or other.rows):
            lines += ["", *_side_by_side(table, other)]
    return "\n".join([*lines, ""])


def _read(where: str) -> Audited:
    path = join(where, FILE) if is_folder(where) else where
    try:
        return Audited.of(bytes(view(path)))
    except ValueError as error:
        raise InputError(f"{path}: {error}; audit the dataset again") from error


def _counts(audited: Audited) -> str:
    verdict = audited.verdict
    return f"{verdict.severe} severe, {many(verdict.warning, 'warning')}, {many(verdict.note, 'note')}"


def _unseen(audited: Audited) -> str:
    return ", ".join(dict.fromkeys(plain(one.audit) for one in audited.unseen)) or "–"


def _findings(a: Audited, b: Audited) -> list[str]:
    one, two = ({(f.audit, f.kind): f for f in audited.findings} for audited in (a, b))
    blind = {"A": {u.audit for u in a.unseen}, "B": {u.audit for u in b.unseen}}
    rows = []
    for key in dict.fromkeys((*two, *one)):
        old, new = one.get(key), two.get(key)
        change, difference = _change(old, new)
        told, other = (old, new), "B" if old else "A"
        why = f" ({other} did not look, or not at everything)" if not (old and new) and key[0] in blind[other] else ""
        severity, pairs = " → ".join(_marked(f) for f in told), " → ".join(f"{f.n:,}" if f else "–" for f in told)
        share = " → ".join(_percent(f.share.value if f else None) for f in told)
        cells = [change + why, severity, plain(f"{key[0]}: {key[1]}"), pairs, share, difference]
        rows.append((ORDER.index(change), f"| {' | '.join(cells)} |"))
    if not rows:
        return ["Nothing was found in either."]
    heads = ["change", "severity A → B", "finding", "pairs A → B", "share A → B", "difference (95%)"]
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(row for _, row in sorted(rows, key=lambda r: r[0])),
    ]


def _marked(finding: Finding | None) -> str:
    return f"{MARKS[finding.severity]} {finding.severity}" if finding else "–"


def _change(old: Finding | None, new: Finding | None) -> tuple[str, str]:
    """What became of a finding, and B - A in points."""
    if old is None or new is None:
        return ("new" if new else "gone"), "–"
    found = newcombe(old.share, new.share)
    if found is None:  # nothing could be looked at in one of them
        return "about the same", "–"
    _, low, high = found
    change = "larger" if low > 0 else "smaller" if high < 0 else "about the same"
    return change, "{:+.3g} ({:+.3g} – {:+.3g})".format(*(100 * end for end in found))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"


def _side_by_side(a: Table, b: Table) -> list[str]:
    """The first rows of both, joined by their first column: A → B where a cell differs."""
    one, two = ({row[0]: row for row in table.rows} for table in (a, b))
    keys = list(dict.fromkeys((*[row[0] for row in b.rows[:ROWS]], *[row[0] for row in a.rows[:ROWS]])))
    lines = [f"## {plain(b.title)}", "", f"| {' | '.join(map(plain, a.columns))} |", "|---" * len(a.columns) + "|"]
    for key in keys:
        old, new = one.get(key), two.get(key)
        cells = [_cell(key), *(_both(old, new, i, _cut(a, b)) for i in range(1, len(a.columns)))]
        lines.append(f"| {' | '.join(cells)} |")
    if max(a.total, b.total) > len(keys):
        lines += ["", f"The first rows of {a.total:,} and {b.total:,}."]
    return lines


def _cut(a: Table, b: Table) -> bool:
    return a.total > len(a.rows) or b.total > len(b.rows)


def _both(old: Sequence[Cell] | None, new: Sequence[Cell] | None, column: int, cut: bool) -> str:
    absent = "?" if cut else "–"  # a row that is missing in a list that was cut may be there
    before, after = (absent if row is None else _cell(row[column]) for row in (old, new))
    return before if before == after else f"{before} → {after}"


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else plain(cell)

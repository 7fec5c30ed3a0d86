"""audit.json for pull requests: verdict, findings, what was not looked at. Captions are hostile here too."""

import re

from pipeline.audits._schema import Audited, Finding
from pipeline.report.text import one_line

MOST = 3  # examples of a finding
MARKS = {"severe": "🔴", "warning": "🟠", "note": "🔵", "clean": "🟢"}
# No more than a renderer needs, for people read this as text too: underscores within a word and colons before a space
# stay. The last two make links.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.")
# A forge looks for people and for issues after it has taken escapes out, so these become characters that name nobody.
_WIDE = str.maketrans({"@": "\uff20", "#": "\uff03"})


def markdown(audited: Audited) -> str:
    """GitHub's Markdown."""
    data, verdict = audited.dataset, audited.verdict
    lost = f", {data.failed:,} unreadable" if data.failed else ""
    lines = [
        f"# {MARKS[verdict.worst]} Audit: {verdict.worst}",
        "",
        plain(verdict.sentence),
        "",
        f"{data.pairs:,} pairs in {data.shards:,} {'shards' if data.kind == 'shards' else 'tables'}{lost}.",
        "",
    ]
    if audited.findings:
        lines += ["| | audit | finding | pairs | share (95%) |", "|---|---|---|---|---|"]
        lines += [
            f"| {MARKS[f.severity]} {f.severity} | {f.audit} | {plain(f.title)} | {f.n:,} | {share(f)} |"
            for f in audited.findings
        ]
        for finding in audited.findings:
            lines += _section(finding)
    if audited.unseen:
        lines += ["", "## Not looked at", "", "| audit | why | what would enable it |", "|---|---|---|"]
        lines += [f"| {u.audit} | {plain(u.why)} | {plain(u.remedy)} |" for u in audited.unseen]
    return "\n".join(lines) + "\n"


def share(finding: Finding) -> str:
    rate = finding.share
    if rate.value is None or rate.low is None or rate.high is None:
        return "–"
    return f"{rate.value:.3%} ({rate.low:.3%}–{rate.high:.3%} of {rate.n:,})"


def plain(text: str) -> str:
    """Text in which nothing is markup, for anywhere but the begin of a line."""
    return _SPECIAL.sub(r"\\\g<0>", one_line(text, 1_000)).translate(_WIDE)


def _section(finding: Finding) -> list[str]:
    lines = ["", f"### {MARKS[finding.severity]} {finding.audit}: {finding.kind}", "", plain(finding.explanation)]
    lines += [f"Source: {plain(finding.source)}.", "", "```", one_line(finding.action, 2_000).replace("`", "'"), "```"]
    for example in finding.examples[:MOST]:
        caption = plain(example.caption) if example.caption else "–"
        lines.append(f"- pair {plain(example.uid)} in {plain(example.shard)}: {caption} ({plain(example.why)})")
    return lines

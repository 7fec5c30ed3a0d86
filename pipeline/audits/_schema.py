"""audit.json as frozen dataclasses: what a report, a pull request or a gate reads (docs/formats.md has it in words)."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from pipeline.spec import fits, type_name
from train.metrics import Rate, wilson

VERSION = 1
Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")  # the worst first
Cell = str | int | float | None


@dataclass(frozen=True)
class Example:
    """One pair of a finding. `caption` is as stored, cut; it is hostile until it is escaped."""

    uid: str
    shard: str
    group: str
    caption: str | None
    why: str


@dataclass(frozen=True)
class Finding:
    """`n` pairs are concerned, `share` is that of the pairs that the audit could look at.

    `file` is the list of their uids, relative to OUT: uid, shard, group, reason; "" where it is about no single pair.
    `action` is a command that removes or checks it.
    """

    audit: str
    kind: str
    severity: Severity
    title: str
    n: int
    share: Rate
    explanation: str
    source: str
    action: str
    file: str
    examples: tuple[Example, ...]

    @property
    def name(self) -> str:
        """Its anchor in the report, and the name of its list."""
        return f"{self.audit}-{self.kind}"


@dataclass(frozen=True)
class Table:
    """The first of `total` rows; each has a cell a column."""

    audit: str
    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: int


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` of n values lie in [edges[i], edges[i + 1]), the last bin with its end; what is above `fence` is
    far out, and a finding of this `kind` where there is one."""

    audit: str
    name: str
    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    n: int
    fence: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Unseen:
    """What was not looked at, why, and what would enable it."""

    audit: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Dataset:
    """`shards` were asked for, of which `failed` could not be read; `sha256` is over those that could, in order."""

    where: str
    kind: Literal["shards", "metadata"]
    shards: int
    failed: int
    pairs: int
    sha256: str


@dataclass(frozen=True)
class Verdict:
    """The worst severity ("clean" without findings), how many findings of each, and that in a sentence."""

    worst: Severity | Literal["clean"]
    severe: int
    warning: int
    note: int
    sentence: str


@dataclass(frozen=True)
class Audited:
    """The whole of audit.json; findings by severity, then by share."""

    dataset: Dataset
    verdict: Verdict
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...]
    histograms: tuple[Histogram, ...]
    unseen: tuple[Unseen, ...]
    audits: tuple[str, ...]
    version: int = VERSION

    def json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False).encode("utf-8", "replace")

    @classmethod
    def of(cls, data: bytes) -> "Audited":
        """Raises ValueError where this is no audit.json of this version."""
        try:
            told = json.loads(data, parse_constant=_no_number)
            if told["version"] != VERSION:
                raise ValueError(f"audit.json of version {told['version']}, not {VERSION}")
            findings = tuple(
                Finding(
                    **{**row, "share": Rate(**row["share"]), "examples": tuple(Example(**e) for e in row["examples"])}
                )
                for row in told["findings"]
            )
            tables = tuple(
                Table(**{**row, "columns": tuple(row["columns"]), "rows": tuple(map(tuple, row["rows"]))})
                for row in told["tables"]
            )
            histograms = tuple(
                Histogram(**{**row, "edges": tuple(row["edges"]), "counts": tuple(row["counts"])})
                for row in told["histograms"]
            )
            unseen = tuple(Unseen(**row) for row in told["unseen"])
            dataset, verdict = Dataset(**told["dataset"]), Verdict(**told["verdict"])
            audited = cls(dataset, verdict, findings, tables, histograms, unseen, tuple(told["audits"]))
            for part in (audited, dataset, verdict, *findings, *tables, *histograms, *unseen):
                _check(part)
            for finding in findings:
                for within in (finding.share, *finding.examples):
                    _check(within)
            return audited
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an audit.json ({error!r})") from error


def _check(part: Any) -> None:
    """Raises TypeError where a field is not of its annotated type."""
    for name, hint in get_type_hints(type(part)).items():
        if not fits(getattr(part, name), hint):
            raise TypeError(f"{name} of a {type(part).__name__} must be {type_name(hint)}")
    if isinstance(part, Table) and any(len(row) != len(part.columns) for row in part.rows):
        raise TypeError("a row of a Table must have a cell a column")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def share_of(k: int, n: int) -> Rate:
    """k of n with its 95% interval."""
    return Rate(k / n, n, *wilson(k, n)) if n else Rate(None, 0, None, None)


def verdict(findings: tuple[Finding, ...], unseen: tuple[Unseen, ...]) -> Verdict:
    """Of findings in order."""
    counts: dict[str, int] = {level: sum(f.severity == level for f in findings) for level in SEVERITIES}
    worst: Any = next((level for level in SEVERITIES if counts[level]), "clean")
    blind = len({one.audit for one in unseen})
    sentence = f"{_counted(counts)}. {_worst(findings[0])}" if findings else "Nothing was found."
    if blind:
        sentence += f" {blind} audit{'s' * (blind > 1)} could not look, or not at everything."
    return Verdict(worst, counts["severe"], counts["warning"], counts["note"], sentence)


def _counted(counts: dict[str, int]) -> str:
    words = {"severe": "severe finding", "warning": "warning", "note": "note"}
    told = [f"{n} {words[name]}{'s' * (n > 1)}" for name, n in counts.items() if n]
    listed = " and ".join([", ".join(told[:-1]), told[-1]]) if len(told) > 1 else told[0]
    return listed if counts["severe"] else f"Nothing severe; {listed}"


def _worst(finding: Finding) -> str:
    return f"{'The worst' if finding.severity == 'severe' else 'First of all'}: {finding.title}."

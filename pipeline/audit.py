"""What a curator should know of a dataset that nobody has told anything about.

Columns of every shard are read once and kept; then each audit of `pipeline/audits/` is a map over them, a merge, and,
where it names pairs, a second look that knows the whole. Trade-off: the second look costs another pass over the
columns (never over images), and in return the first one's counts are small (a sketch, a row a domain).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline import ledger as ledgers
from pipeline import sidecars, spec
from pipeline.arguments import Out, Shards
from pipeline.audit_lists import Removal, quoted, shown
from pipeline.dataset import read_dataset
from pipeline.embed import embeddings_path
from pipeline.errors import InputError
from pipeline.inputs import EMBEDDED, Inputs
from pipeline.progress import console
from pipeline.scored import Scored
from pipeline.shard_map import (
    Job,
    ShardsFailed,
    each,
    failure_path,
    locked,
    marker_path,
    read_markers,
    shard_map,
    succeeded,
    summed,
)
from pipeline.shards import Shard, UidRule
from pipeline.shards.store import (
    absolute,
    existing,
    exists,
    glob,
    is_folder,
    join,
    make_folder,
    refuse_folder_of,
    remove,
    view,
    write,
)

if TYPE_CHECKING:
    from pipeline.audit_columns import Source
    from pipeline.audits._audit import About, Found, Report
    from pipeline.audits._schema import Audited, Finding, Unseen

EXAMPLES = 12  # of a finding, in audit.json


def audit(
    shards: Shards,
    out: Out,
    /,
    *,
    embeddings: str | None = None,
    scores: tuple[str, ...] = (),
    ledger: str | None = None,
    attribute: tuple[str, ...] = (),
    fail_on: Literal["never", "severe", "warning"] = "never",
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Look for poison and for what is like it in SHARDS, of which nothing needs to be known; writes OUT/report.html.

    Args:
        shards: folder, glob, brace pattern or list file of shards; or of tables of metadata (parquet, csv, tsv).
        out: folder for report.html, its twins audit.json and audit.md, findings/ (a list of uids for each) and the
            columns that were read.
        embeddings: folder that `mithridate embed` wrote for these shards.
        scores: folders that `mithridate score` wrote for these shards.
        ledger: default: ledger.parquet beside the shards, if there is one.
        attribute: words of captions that colours and sizes should not tell, e.g. woman women she her.
        fail_on: exit code 1 where there is a finding as bad as this.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
        max_failed_shards: so many shards may be unreadable without exit code 1; they are a finding in any case.
    """
    from pipeline.audit_columns import Columns, Source, list_inputs, sha256_of_file
    from pipeline.audit_nearest import IMAGE
    from pipeline.audit_report import write_report

    listed, metadata = list_inputs(shards)
    out = absolute(out)
    refuse_folder_of(listed, out)
    if metadata and (embeddings or scores or ledger):
        raise InputError("--embeddings, --scores and --ledger are of shards; these are tables of metadata")
    for verb, folder in (("embed", embeddings), *(("score", folder) for folder in scores)):
        if folder and not is_folder(folder):
            raise InputError(f"{folder}: no such folder; `mithridate {verb}` makes it")
    if metadata:
        console.print(f"no column of {len(listed):,} files has images: they are audited as tables of metadata")
    source = Source(
        out, Inputs(absolute(embeddings) if embeddings else "", "", "", uid), tuple(map(absolute, scores)), metadata
    )
    with locked(out):
        facts = {"uid": uid, "kind": "metadata" if metadata else "shards"}
        for stale in ("report.html", "audit.json", "audit.md"):  # of other data, perhaps, if this run is killed
            remove(join(out, stale))
        job = Job("audit", facts, out, len(listed))
        if metadata:
            job = Job("audit", facts, out, len(listed), sha256=sha256_of_file)
        markers = shard_map(job, listed, Columns(uid, metadata))
        about = _about(shards, listed, markers, out, metadata)
        ledger = ledger or (_beside(listed) if not metadata else None)
        there = [shard for shard in listed if shard.file in about.pairs]
        missing = _missing(there, source, not ledger)
        reports, unseen = _look(there, about, source, ledger, attribute, missing)
        audited, found = _written(shards, out, reports, unseen, about)
        write_report(audited, found, there, about, source, {"scores", IMAGE} - missing.keys(), ledger)
    _print(audited, out)
    if len(about.failed) > max_failed_shards:
        named = "; ".join(about.failed.values())
        raise ShardsFailed(f"{len(about.failed)} of {len(listed)} shards could not be audited: {named}")
    levels = {"never": (), "severe": ("severe",), "warning": ("severe", "warning")}[fail_on]
    return int(any(finding.severity in levels for finding in audited.findings))


def _about(
    where: str, shards: Sequence[Shard], markers: Sequence[Mapping[str, Any]], out: str, metadata: bool
) -> "About":
    from pipeline.audits._audit import About

    read = {marker["input"]["file"]: marker for marker in markers}
    failed = {}
    for shard in shards:
        if shard.file not in read:
            path = failure_path(out, shard)
            failed[shard.file] = bytes(view(path)).decode(errors="replace") if exists(path) else "cannot be read"
    folders: dict[str, list[Shard]] = {}
    for shard in shards if not metadata else ():
        folders.setdefault(shard.path.rpartition("/")[0] or ".", []).append(shard)
    recorded, unrecorded, made_by = [], set(), {}
    for folder, here in folders.items():
        named = {shard.file for shard in here}
        if exists(join(folder, "manifest.parquet")):
            recorded += [row for row in read_dataset(folder)[0] if is_folder(where) or row.shard in named]
        else:
            unrecorded |= named
        paths = {marker_path(folder, shard): shard for shard in here}
        marked = sorted(existing(list(paths)))
        for shard, marker in zip((paths[path] for path in marked), read_markers(marked), strict=True):
            if marker and marker["output"] == shard.file and shard.file in read:
                made_by[shard.file] = marker
    return About(
        pairs={shard.file: read[shard.file]["out"] for shard in shards if shard.file in read},
        sha256={shard.file: read[shard.file]["input_sha256"] for shard in shards if shard.file in read},
        failed=failed,
        recorded=recorded,
        made_by=made_by,
        images=not metadata,
        unrecorded=frozenset(unrecorded),
        lost=summed(marker["reasons"] for marker in markers),
        unusable=summed(marker["facts"].get("unusable", {}) for marker in markers),
    )


def _beside(shards: Sequence[Shard]) -> str | None:
    """The ledger that lies there, if any."""
    path = ledgers.beside(shards)
    return path if exists(path) else None


# The audits


def _look(
    shards: Sequence[Shard],
    about: "About",
    source: "Source",
    ledger: str | None,
    attribute: tuple[str, ...],
    missing: Mapping[str, tuple[str, str]],
) -> tuple[dict[str, "Report"], list["Unseen"]]:
    """The report of each audit that could look, and why others could not."""
    import polars as pl

    from pipeline.audits._schema import Unseen

    known = ledgers.poisoned_uids(ledger) if ledger else None
    entries, unseen = {}, []
    for name in spec.names("audits"):
        entry = spec.entry("audits", name)(*((attribute,) if name == "leakage" else ()))
        why = dict.fromkeys(missing[need] for need in entry.needs if need in missing)
        unseen += [Unseen(name, *reason) for reason in why]
        if not why:
            entries[name] = entry
    merged = {name: entry.empty() for name, entry in entries.items() if hasattr(entry, "empty")}
    for _, part in succeeded(each("map", shards, _Map(entries, source, about.sha256), known)):
        for name, counts in part.of.items():
            merged[name] = entries[name].merge(merged[name], counts) if name in merged else counts
    marking = {name: entry for name, entry in entries.items() if hasattr(entry, "mark") and name in merged}
    make_folder(join(source.out, "marks"))
    files: dict[str, list[str]] = {name: [] for name in marking}
    for _, part in succeeded(each("mark", shards, _Mark(marking, source, about.sha256), known, merged)):
        for name, file in part.of.items():
            files[name].append(file)
    reports = {}
    for name, counts in merged.items():
        marks = pl.read_parquet(sorted(files[name]), glob=False) if files.get(name) else None
        reports[name] = entries[name].report(counts, marks, about)
    unseen += [Unseen(name, "there is no pair to look at", "see the findings") for name in entries.keys() - reports]
    return reports, unseen


def _missing(shards: Sequence[Shard], source: "Source", unknown: bool) -> dict[str, tuple[str, str]]:
    """By column that an audit may need, why it is not there and what would enable it."""
    from pipeline.audit_columns import OF_IMAGES

    told: dict[str, tuple[str, str]] = {}
    if source.metadata:
        why = "these are tables of metadata, without images"
        told |= dict.fromkeys(OF_IMAGES, (why, "download them (img2dataset) and audit the shards"))
    embeddings = [embeddings_path(source.inputs.embeddings, shard.name) for shard in shards]
    scored = Scored(source.scores).complete([shard.name for shard in shards]) if source.scores else []
    for columns, option, have, remedy in (
        (EMBEDDED, source.inputs.embeddings, len(existing(embeddings)), "`mithridate embed` makes them; --embeddings"),
        (("scores",), source.scores, len(scored), "`mithridate score` makes them; --scores"),
    ):
        if not option:
            told |= dict.fromkeys(columns, (f"no {remedy.rpartition('--')[2]} were given", f"{remedy} DIR"))
        elif have < len(shards):
            lacking = f"{len(shards) - have:,} of {len(shards):,} shards have no {remedy.rpartition('--')[2]} there"
            told |= dict.fromkeys(columns, (lacking, f"{remedy} DIR"))
    if unknown:
        told["poisoned"] = ("no ledger: nobody has said which pairs are poisons", "--ledger FILE")
    return told


@dataclass(frozen=True)
class _Part:
    """Of one shard, by audit: counts, or the file of its marks."""

    read: int
    of: dict[str, Any]


@dataclass(frozen=True)
class _Map:
    audits: Mapping[str, Any]
    source: "Source"
    sha256: Mapping[str, str]

    def __call__(self, shard: Shard, known: set[str] | None) -> _Part:
        needs = {need for entry in self.audits.values() for need in entry.needs}
        rows = self.source.rows(shard, self.sha256[shard.file], needs, known or set())
        return _Part(len(rows), {name: entry.map(rows) for name, entry in self.audits.items()} if len(rows) else {})


@dataclass(frozen=True)
class _Mark:
    audits: Mapping[str, Any]
    source: "Source"
    sha256: Mapping[str, str]

    def __call__(self, shard: Shard, known: set[str] | None, merged: Mapping[str, Any]) -> _Part:
        needs = {need for entry in self.audits.values() for need in entry.needs}
        rows = self.source.rows(shard, self.sha256[shard.file], needs, known or set())
        files = {}
        for name, entry in self.audits.items() if len(rows) else ():
            files[name] = join(self.source.out, f"marks/{shard.name}.{name}.parquet")
            sidecars.save(files[name], entry.mark(rows, merged[name]).to_arrow())
        return _Part(len(rows), files)


# What is written


def _written(
    where: str, out: str, reports: Mapping[str, "Report"], unseen: Sequence["Unseen"], about: "About"
) -> tuple["Audited", dict[str, "Found"]]:
    """Write audit.json, audit.md and the lists of uids; returns what was found by AUDIT-KIND, too."""
    from pipeline.audits._markdown import markdown
    from pipeline.audits._schema import SEVERITIES, Audited, Dataset, verdict

    make_folder(join(out, "findings"))
    for stale in glob(join(out, "findings/*.parquet")):
        remove(stale)
    found = {f"{audit}-{one.kind}": (audit, one) for audit, report in reports.items() for one in report.found}
    findings = tuple(
        sorted(
            (_finding(where, out, *one, about) for one in found.values()),
            key=lambda f: (SEVERITIES.index(f.severity), -(f.share.value or 0), f.audit, f.kind),
        )
    )
    every = tuple(sorted((*unseen, *(u for r in reports.values() for u in r.unseen)), key=lambda u: (u.audit, u.why)))
    digest = spec.digest([about.sha256[name] for name in about.pairs])
    kind: Literal["shards", "metadata"] = "shards" if about.images else "metadata"
    pairs, failed = sum(about.pairs.values()), len(about.failed)
    audited = Audited(
        Dataset(where, kind, len(about.pairs) + failed, failed, pairs, digest),
        verdict(findings, every),
        findings,
        tuple(table for _, report in sorted(reports.items()) for table in report.tables),
        tuple(drawn for _, report in sorted(reports.items()) for drawn in report.histograms),
        every,
        tuple(spec.names("audits")),
    )
    write(join(out, "audit.json"), audited.json())
    write(join(out, "audit.md"), markdown(audited).encode("utf-8", "replace"))
    return audited, {name: one for name, (_, one) in found.items()}


def _finding(where: str, out: str, audit: str, found: "Found", about: "About") -> "Finding":
    from pipeline.audits._schema import Example, Finding, share_of

    file, name = "", f"{audit}-{found.kind}"
    examples: tuple[Example, ...] = ()
    if found.members is not None and found.members.height:
        file = f"findings/{name}.parquet"
        sidecars.save(join(out, file), found.members.select("uid", "shard", "group", "reason").to_arrow())
        columns = ("uid", "shard", "group", "caption", "reason")
        examples = tuple(Example(*row) for row in shown(found.members, EXAMPLES).select(columns).iter_rows())
    if found.remedy:
        action = found.remedy.replace("{shards}", quoted(where))
    elif about.images:
        action = Removal(where, out).commands(name, join(out, file), found.keep)
    else:
        action = f"# leave the uids of {join(out, file)} out when you download"
    return Finding(
        audit=audit,
        kind=found.kind,
        severity=found.severity,
        title=found.title,
        n=found.n,
        share=share_of(found.n, found.of),
        explanation=found.explanation,
        source=found.source,
        action=action,
        file=file,
        examples=examples,
    )


def _print(audited: "Audited", out: str) -> None:
    from pipeline.report.text import one_line

    for finding in audited.findings:
        console.print(f"  {finding.severity:<8}{finding.audit}: {one_line(finding.title)}")
    for one in audited.unseen:
        console.print(f"  not looked at: {one.audit} ({one.why}); {one.remedy}")
    console.print(f"{one_line(audited.verdict.sentence)} See {join(out, 'report.html')}")


if __name__ == "__main__":
    from pipeline.cli import run

    run("audit")

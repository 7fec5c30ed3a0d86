"""Are the shards still what their manifest says, and if not, which samples are not?

Trade-off: a shard is first hashed along the recorded byte ranges, which needs no parsing and runs at the speed of the
hash. Only one that differs is read sample by sample to say how.
"""

import collections
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import sidecars
from pipeline.arguments import Shards
from pipeline.dataset import Row, read_dataset
from pipeline.errors import InputError
from pipeline.ledger import ledger_path
from pipeline.progress import console
from pipeline.shard_map import Job, each, marker_path, shard_map
from pipeline.shards import Counts, Manifest, Shard, UidRule, intact, list_shards, manifest
from pipeline.shards.manifest import read_manifest
from pipeline.shards.store import absolute, exists, is_folder, join, remove, stamp, view

LISTED = 1_000  # problems of one shard that are kept; all are counted
SHOWN = 20


class NotIntact(InputError):
    """What was verified is not what was recorded."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """`kind`: changed, missing, extra, duplicated, moved, between (of no sample), unreadable, stale (the manifest)."""

    shard: str
    kind: str
    what: str
    uid: str = ""
    key: str = ""
    digests: str = ""  # hex of what was found, or of what is missing


def verify(
    shards: Shards,
    /,
    *,
    manifest: str | None = None,
    out: str | None = None,
    sha256: str | None = None,
    published: str | None = None,
    embeddings: str | None = None,
    reference: str | None = None,
    uid: UidRule = "key",
) -> int:
    """Check SHARDS against their manifest and say which sample is not as it was. Exit code 1 if any is not.

    With --published, check them instead against the hashes that their dataset ships: are these the images that its
    curator saw? Mismatches are told apart (encoded again, another picture) and clustered by registrable domain.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        manifest: folder of manifest.parquet; default: that of the shards.
        out: folder for problems.parquet, or for what --published finds; with it, an interrupted check goes on.
        sha256: of the whole dataset, as it was noted down elsewhere; a forged manifest does not pass it.
        published: metadata of LAION, DataComp, COYO, … (parquet, csv, tsv) with sha256, md5 or perceptual hashes.
        embeddings: for --published: folder that `embed` wrote for these shards, to compare similarities.
        reference: for --published: shards of a trusted copy, to compare pictures.
        uid: how a uid is derived where samples carry none; the same as when the manifest was made.
    """
    listed = list_shards(shards)
    if published:
        from pipeline.published import published as check

        if not out:
            raise InputError("--published needs --out, a folder for what it finds")
        return check(listed, published, out, uid, embeddings, reference)
    if embeddings or reference:
        raise InputError("--embeddings and --reference belong to --published")
    folder = absolute(manifest or listed[0].path.rpartition("/")[0] or ".").removesuffix("/manifest.parquet")
    rows, digest = read_dataset(folder)
    if sha256 and sha256.lower() != digest:
        raise NotIntact(f"{folder}: sha256 of the dataset is {digest}, not {sha256}: another manifest, or a forged one")
    expected = {row.shard: row for row in rows}
    units = [_Recorded(shard.path, expected.get(shard.file)) for shard in listed]
    work = _Verify(folder, uid)
    if out:
        out = absolute(out)
        results = shard_map(Job("verify", {"dataset": digest, "uid": uid}, out), units, work)
    else:
        results = [_marker(unit, found) for unit, found in each("verify", units, work, None)]
    found = _Found.of(results, {row.sha256: row.shard for row in rows})
    if is_folder(shards):
        there = {shard.file for shard in listed}
        found.add(Problem(row.shard, "missing", "the whole shard") for row in rows if row.shard not in there)
    found.add(_ledger(folder))
    if out:
        _save(out, found.problems)
        for unit in units:
            if unit.file in found.shards:  # looked at again by the next check: it may have been mended
                remove(marker_path(out, unit))
    return _report(results, found, rows, digest, out)


@dataclass(frozen=True, slots=True)
class _Recorded(Shard):
    """A shard, and the row of the dataset's manifest about it."""

    row: Row | None


@dataclass(frozen=True)
class _Verify:
    """One shard against its part of the manifest."""

    folder: str
    uid: UidRule

    def __call__(self, shard: Any, _: str | None) -> Counts:
        size = stamp(shard.path)["bytes"]
        known, problems = self._known(shard)
        if known and size == shard.row.bytes and intact(shard, known):
            found = known
        else:
            found = self._explain(shard, known, problems)
        n = len(found.uids)
        facts = {"problems": [asdict(p) for p in problems[:LISTED]], "bytes": size}
        reasons = dict(collections.Counter(p.kind for p in problems))
        return Counts(read=n, out=n, input_sha256=found.sha256, reasons=reasons, facts=facts)

    def _known(self, shard: Any) -> tuple[Manifest | None, list[Problem]]:
        """The shard's part of the manifest, if it can be trusted, and else why not."""
        if shard.row is None:
            return None, [Problem(shard.file, "extra", "the whole shard is not in the manifest")]
        try:
            known = read_manifest(self.folder, shard.name)
        except InputError as error:
            return None, [Problem(shard.file, "stale", str(error))]
        if known.sha256 != shard.row.sha256:
            return None, [Problem(shard.file, "stale", "its part of the manifest is not the one that was recorded")]
        return known, []

    def _explain(self, shard: Shard, known: Manifest | None, problems: list[Problem]) -> Manifest:
        """What the shard is now; adds to `problems` how that differs."""
        try:
            found = manifest(shard, self.uid)
        except InputError as error:
            problems.append(Problem(shard.file, "unreadable", str(error)))
            return Manifest()
        if known:
            problems += _differences(shard.file, known, found)
        return found


@dataclass
class _Found:
    """The problems of all shards: at most LISTED of each, but all of them counted."""

    problems: list[Problem] = field(default_factory=list)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    shards: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, results: list[dict[str, Any]], recorded: dict[str, str]) -> "_Found":
        """`recorded` names shards by their sha256: one that lies under another's name is no list of changes."""
        found = cls()
        for marker in results:
            listed = [Problem(**p) for p in marker["facts"]["problems"]]
            other = recorded.get(marker["input_sha256"]) if listed else None
            if other and other != listed[0].shard:
                found.add([Problem(listed[0].shard, "moved", f"this is {other} under another name")])
                continue
            found.add(listed)
            found.kinds.update(marker["reasons"])
            found.kinds.subtract(p.kind for p in listed)  # counted by `add`
        found._join_moved()
        return found

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.problems.append(problem)
            self.kinds[problem.kind] += 1
            self.shards.add(problem.shard)

    def _join_moved(self) -> None:
        """A sample that is missing in one shard and extra in another was moved."""
        gone = {p.digests: p for p in self.problems if p.kind == "missing" and p.digests}
        moved = {p.digests: p for p in self.problems if p.kind == "extra" and p.digests in gone}
        self.problems = [p for p in self.problems if not (p.kind in ("missing", "extra") and p.digests in moved)]
        self.kinds.subtract({"missing": len(moved), "extra": len(moved)})
        self.add(Problem(gone[d].shard, "moved", f"to {p.shard}", p.uid, p.key, d) for d, p in moved.items())


@dataclass
class _Rows:
    """Digests (64 bytes) of the samples of a manifest by uid, and the uids by digest of the image."""

    order: list[str] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    of_image: dict[bytes, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, content: Manifest) -> "_Rows":
        rows = cls()
        for i, (uid, key) in enumerate(zip(content.uids, content.keys, strict=True)):
            if uid in rows.digests:
                rows.twice.append(uid)
                continue
            digest = bytes(content.digests[64 * i : 64 * i + 64])
            rows.order.append(uid)
            rows.digests[uid], rows.keys[uid] = digest, key
            rows.of_image.setdefault(digest[:32], uid)
        return rows


def _differences(shard: str, known: Manifest, found: Manifest) -> Iterable[Problem]:
    was, now = _Rows.of(known), _Rows.of(found)
    for uid in now.twice:
        yield Problem(shard, "duplicated", "occurs more than once", uid, now.keys[uid])
    for uid, digest in was.digests.items():
        if uid not in now.digests:
            yield Problem(shard, "missing", "", uid, was.keys[uid], digest.hex())
        elif (new := now.digests[uid]) != digest:
            image, rest = new[:32] != digest[:32], new[32:] != digest[32:]
            what = " and ".join(["image"] * image + ["caption, metadata or headers"] * rest)
            if image and (owner := was.of_image.get(new[:32])):
                what += f"; it has the image of {owner}"
            yield Problem(shard, "changed", what, uid, now.keys[uid], new.hex())
    for uid, digest in now.digests.items():
        if uid not in was.digests:
            yield Problem(shard, "extra", "", uid, now.keys[uid], digest.hex())
    both = was.digests.keys() & now.digests.keys()
    if [u for u in was.order if u in both] != [u for u in now.order if u in both]:
        yield Problem(shard, "moved", "the samples are in another order")
    if known.between != found.between and known.digests == found.digests:
        yield Problem(shard, "between", "bytes that belong to no sample")


def _ledger(folder: str) -> Iterable[Problem]:
    """The ledger is believed by filters and trainers; dataset.json holds its sha256."""
    path, facts = ledger_path(folder), join(folder, "dataset.json")
    try:
        summary = json.loads(bytes(view(facts))) if exists(facts) else {}
    except ValueError:
        summary = {}
    recorded = {v for k, v in summary.items() if k.startswith("ledger_sha256")} if isinstance(summary, dict) else set()
    if recorded and (not exists(path) or hashlib.sha256(view(path)).hexdigest() not in recorded):
        yield Problem(
            "ledger.parquet", "changed" if exists(path) else "missing", "not the ledger that dataset.json names"
        )


def _marker(shard: Shard, found: Any) -> dict[str, Any]:
    if isinstance(found, InputError):  # the worker was lost, or the file is not there any more
        facts = {"problems": [asdict(Problem(shard.file, "unreadable", str(found)))], "bytes": 0}
        found = Counts(reasons={"unreadable": 1}, facts=facts)
    return asdict(found)


def _save(out: str, problems: list[Problem]) -> None:
    import pyarrow as pa

    names = list(Problem.__dataclass_fields__)
    table = pa.table({name: pa.array([getattr(p, name) for p in problems], pa.string()) for name in names})
    sidecars.save(join(out, "problems.parquet"), table)


def _report(results: list[dict[str, Any]], found: _Found, rows: list[Row], digest: str, out: str | None) -> int:
    samples, shards = sum(m["read"] for m in results), len(results)
    if not found.problems:
        whole = "all" if shards == len(rows) else f"{shards:,} of {len(rows):,}"
        console.print(f"{samples:,} samples in {whole} shards are as recorded; sha256 of the dataset: {digest}")
        return 0
    for p in found.problems[:SHOWN]:
        name = f"{p.shard}: {p.key or p.uid}" if p.key or p.uid else p.shard
        console.print(f"  {p.kind:<11}{name}{f' (uid {p.uid})' if p.key else ''} {p.what}".rstrip())
    total = sum(found.kinds.values())
    if total > SHOWN:
        where = f"{join(out, 'problems.parquet')} has" if out else "with --out DIR, a table has"
        console.print(f"  … and {total - SHOWN:,} more; {where} up to {LISTED:,} of each shard")
    tally = ", ".join(f"{n:,} {kind}" for kind, n in sorted(found.kinds.items()) if n)
    raise NotIntact(f"{tally}; {samples:,} samples in {shards:,} shards were read")


if __name__ == "__main__":
    from pipeline.cli import run

    run("verify")

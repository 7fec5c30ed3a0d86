"""Run detectors and keep their scores beside the data; nothing is decided here.

Trade-off: every detector sees one shard and one pool of reference rows drawn from all shards, so scoring is one pass.
The pool's size is part of a density detector's meaning and is recorded with the scores.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from filters._batch import Batch, Drawn
from filters._knn import clock, cost
from filters._wants import Wants
from pipeline import sidecars, spec
from pipeline.arguments import Out, Shards, at_least_one
from pipeline.config import POOL
from pipeline.errors import InputError
from pipeline.inputs import EARLIER, EMBEDDED, Inputs
from pipeline.ledger import beside, poisoned_uids
from pipeline.neighbours import Neighbours
from pipeline.progress import console
from pipeline.reference import check_one_model, draw_pool, look_within
from pipeline.shard_map import RUN, Job, check_made_from, clear, code_digest, each, shard_map, succeeded
from pipeline.shards import Counts, Shard, UidRule, list_shards, manifest, uids
from pipeline.shards.sample import check_unique
from pipeline.shards.store import absolute, exists, glob, join, stamp, view
from train.metrics import wilson


def score(
    shards: Shards,
    out: Out,
    /,
    *,
    detector: tuple[str, ...],
    embeddings: str | None = None,
    earlier: str | None = None,
    traces: str | None = None,
    ledger: str | None = None,
    pool: int = POOL,
    probes: int = 0,
    seed: int = 0,
    uid: UidRule = "key",
    max_failed_shards: int = 0,
) -> int:
    """Score SHARDS with detectors; writes OUT/<shard>.scores.parquet, higher = more suspicious.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for the scores.
        detector: one or more, e.g. "slof(k=16)" clip_score; see `mithridate list detectors`.
        embeddings: folder that `mithridate embed` wrote for these shards.
        earlier: the same of an earlier checkpoint, for detectors that compare two.
        traces: folder of traces that `mithridate train` wrote for these shards.
        ledger: for `oracle`; default: ledger.parquet beside the shards.
        pool: reference rows of the neighbour detectors, drawn from all shards.
        probes: search so many inverted lists of a large pool (32, say), not all of it; how much is missed is told.
        seed: another seed draws another pool.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in OUT.
    """
    listed, out = list_shards(shards), absolute(out)
    at_least_one("--detector", detector)
    entries = [spec.parse("detectors", text) for text in detector]
    embedded, before, traced = (absolute(folder) if folder else "" for folder in (embeddings, earlier, traces))
    inputs = Inputs(embedded, before, traced, uid)
    wants = Wants.of(*entries)
    inputs.check(listed, wants.needs)
    names = [spec.text(entry) for entry in entries]
    _refuse_to_drop(out, names)
    known = None
    if "poisoned" in wants.needs:
        known = poisoned_uids(ledger or beside(listed))
    if pool < 1 or probes < 0:
        raise InputError("--pool is at least 1, --probes at least 0")
    k = max(wants.k, default=0)
    reference = None
    if wants.pools:
        reference = draw_pool(listed, inputs, wants.pools, pool, seed, max_failed_shards, k, probes)
    for entry in entries:
        if reference and not all(0 < k < len(reference.rows) for k in Wants.of(entry).k):
            raise InputError(
                f"{spec.text(entry)}: k must be between 1 and the pool's {len(reference.rows)} rows less one"
            )
    models = reference.models if reference else {}
    facts = {
        "detectors": names,
        "model": models.get("embeddings", ""),
        "earlier_model": models.get("earlier", ""),
        "pool": len(reference.rows) if reference else 0,
        "pool_digest": spec.digest(reference.rows.drawn.digests) if reference else "",
        "k": k,
        "probes": probes if reference else 0,
        "seed": seed,
        "uid": uid,
        "inputs": spec.digest([stamp(path) for path in [*inputs.files(listed, wants.needs), *sorted(wants.files)]]),
        "ledger": spec.digest(sorted(known)) if known is not None else "",
        # a summary is of all shards: where one changes, the scores of the others do
        "shards": spec.digest([stamp(shard.path) for shard in listed]) if wants.whole else "",
    }
    if reference:
        _say_company(reference.rows, wants.k, ledger or beside(listed))
        look_within(reference.rows, wants.within)
    summaries = _summaries(listed, entries, inputs, max_failed_shards)
    work = _Score(tuple(entries), inputs, models, facts)
    job = Job("score", facts, out, max_failed_shards)
    gpu = wants.gpu or bool(wants.k or wants.in_batch)
    markers = shard_map(job, listed, work, reference.rows if reference else None, known, summaries, gpu=gpu)
    for marker in markers:  # without a pool no shard knew of another
        check_one_model(models, marker["facts"]["models"], marker["output"])
        models = models | marker["facts"]["models"]
    _report(markers, names, probes)
    return 0


def _report(markers: Sequence[dict[str, Any]], names: Sequence[str], probes: int) -> None:
    total = sum(m["read"] for m in markers)
    for name in names:
        spent = sum(m["seconds"].get(name, 0.0) for m in markers)
        unscored = sum(m["facts"]["unscored"][name] for m in markers)
        note = f", {unscored} unscored (taken as most suspicious)" if unscored else ""
        ends = {end for m in markers for end in m["facts"]["range"].get(name, ())}
        note += ", the same score for all: it tells nothing apart" if len(ends) == 1 and total > unscored + 1 else ""
        console.print(f"  {name}: {1e6 * spent / max(total, 1):.1f} µs a pair{note}")
    hits, of = (sum(m["facts"]["recall"][i] for m in markers) for i in (0, 1))
    if of:
        low, high = wilson(hits, of)
        console.print(
            f"  of the nearest rows {probes} probes found {hits / of:.1%} ({low:.1%}–{high:.1%} of {of:,}, which were "
            "looked up in the whole pool)"
        )


def _say_company(pool: Batch, ks: Sequence[int], ledger: str) -> None:
    """A poison with k of its kind in the pool is in good company: say from which share of the dataset on that is so."""
    if ks:
        shares = ", ".join(f"k={k} from {k / len(pool):.2%}" for k in sorted(ks))
        console.print(
            f"pool of {len(pool):,}; of a poison that is a share p of the dataset it has p times as many, its k "
            f"nearest may all be of its kind: {shares}"
        )
    if exists(ledger):
        known = poisoned_uids(ledger)
        there = sum(who in known for who in pool.uid)
        console.print(f"  by {ledger} it has {there:,} poisons in it, of {len(known):,}")


def scores_path(folder: str, shard_name: str) -> str:
    return join(folder, f"{shard_name}.scores.parquet")


def read_scores(path: str) -> dict[str, np.ndarray]:
    """`uid` str[n] and one float32[n] a detector spec."""
    table = sidecars.read(path, ("uid",), "make the scores with `mithridate score`")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def scored_by(out: str) -> list[str]:
    """The detectors that OUT has scores of."""
    run = join(out, RUN)
    if not exists(run) or not glob(join(out, "*.scores.parquet")):
        return []
    try:
        return list(json.loads(bytes(view(run)))["spec"]["detectors"])
    except (ValueError, KeyError, TypeError):
        return []


def _refuse_to_drop(out: str, names: Sequence[str]) -> None:
    """Raises InputError where OUT has scores of detectors that are not named now: hours may be in them."""
    if gone := [name for name in scored_by(out) if name not in names]:
        raise InputError(
            f"{out} has scores of {', '.join(gone)}, which this run would drop: name them too (what is the same is "
            "taken over), or choose another folder, since `filter --scores A B` reads several"
        )


def _summaries(shards: Sequence[Shard], entries: Sequence[Any], inputs: Inputs, max_failed: int) -> dict[str, Any]:
    """By detector, what it makes of the whole dataset; one pass for all that want one."""
    asking = [entry for entry in entries if Wants.of(entry).whole]
    total: dict[str, Any] = {}
    if not asking:
        return total
    by_name = {spec.text(entry): entry for entry in asking}
    for _, found in succeeded(each("summaries", shards, _Summarize(tuple(asking), inputs)), max_failed):
        for name, part in found.by_detector.items():
            total[name] = by_name[name].merge(total[name], part) if name in total else part
    return total


@dataclass(frozen=True)
class _Summary:
    read: int
    by_detector: dict[str, Any]


@dataclass(frozen=True)
class _Summarize:
    entries: tuple[Any, ...]
    inputs: Inputs

    def __call__(self, shard: Shard) -> _Summary:
        needs = Wants.of(*self.entries).needs
        batch, _ = self.inputs.batch(shard, uids(shard, self.inputs.uid), needs)
        asking = self.entries if len(batch) else ()  # an empty shard tells nothing
        return _Summary(len(batch), {spec.text(entry): entry.summarize(batch) for entry in asking})


@dataclass(frozen=True)
class _Score:
    """All detectors over one shard."""

    entries: tuple[Any, ...]
    inputs: Inputs
    models: dict[str, str]
    facts: dict[str, Any]
    clears: ClassVar[bool] = True

    def __call__(
        self, shard: Shard, out: str, pool: Batch | None, known: set[str] | None, summaries: dict[str, Any]
    ) -> Counts:
        path = scores_path(out, shard.name)
        made = _made(path)
        clear(out, shard)
        content = manifest(shard, self.inputs.uid)
        check_unique(content.uids, shard.path)
        sha256 = content.sha256
        wants = Wants.of(*self.entries)
        for folder, embedded in ((self.inputs.embeddings, EMBEDDED), (self.inputs.earlier, EARLIER)):
            if set(embedded) & set(wants.needs):
                check_made_from(folder, shard, sha256, "run `mithridate embed` on them")
        batch, models = self.inputs.batch(shard, content.uids, wants.needs)
        batch = dataclasses.replace(batch, drawn=Drawn(max(wants.in_batch, default=0)))
        check_one_model(self.models, models, shard.name)
        if known is not None:
            batch = dataclasses.replace(batch, poisoned=np.asarray([u in known for u in content.uids], bool))
        counts = Counts(read=len(batch), out=len(batch), output=f"{shard.name}.scores.parquet", input_sha256=sha256)
        stamps = self.inputs.stamps(shard, wants.needs)
        if pool is not None:
            near = Neighbours.of(out, shard.name, stamps)
            before = near.load(batch, pool)
        columns: dict[str, np.ndarray] = {}
        of: dict[str, str] = {}
        took: dict[str, list[float]] = {}
        for entry in self.entries:
            name = spec.text(entry)
            of[name] = self._of(entry, sha256, stamps, pool)
            if made.of.get(name) == of[name]:
                columns[name], took[name] = made.columns[name], made.took[name]
            elif len(batch):
                columns[name], took[name] = self._scored(entry, shard, batch, pool, summaries)
            else:
                columns[name], took[name] = np.empty(0, np.float32), [0.0, 0.0]
        recall = near.save(batch, pool, before) if pool is not None else (0, 0)
        unscored = {name: int(np.isnan(values).sum()) for name, values in columns.items()}
        counts.seconds |= {name: seconds for name, (seconds, _) in took.items()}
        counts.facts = {"unscored": unscored, "models": models, "recall": recall}
        counts.facts["core_seconds"] = {name: seconds for name, (_, seconds) in took.items()}
        counts.facts["range"] = {
            name: [float(np.nanmin(v)), float(np.nanmax(v))] for name, v in columns.items() if unscored[name] < len(v)
        }
        _write(path, batch.uid, columns, {**self.facts, "of": of, "took": took})
        return counts

    def _scored(
        self, entry: Any, shard: Shard, batch: Batch, pool: Batch | None, summaries: dict[str, Any]
    ) -> tuple[np.ndarray, list[float]]:
        """Scores, and what they cost as of `clock`: what another detector had searched counts as if it were alone."""
        name = spec.text(entry)
        summary = (summaries[name],) if name in summaries else ()
        there, begin = {*batch.found}, clock()
        batch.asked.clear()
        try:
            scores = np.asarray(entry.score(batch, pool, *summary), np.float32)
            return scores, (clock() - begin + cost(batch, there & batch.asked)).tolist()
        except ValueError as error:  # too few rows to have k neighbours among
            raise InputError(
                f"{shard.path}: {name}: {error}; `mithridate compact` joins small shards, and reference='pool' asks "
                "for no others in the shard"
            ) from error

    def _of(self, entry: Any, sha256: str, stamps: Mapping[str, Any], pool: Batch | None) -> str:
        """What a column is made of: where this is the same, so are the scores."""
        wants = Wants.of(entry)
        files = [stamps[name] for name in sorted(stamps.keys() & wants.needs)] + list(map(stamp, sorted(wants.files)))
        pools = sorted(set(wants.pools) - {"uid"})
        drawn = [pool.drawn.digest(pools), pool.drawn.probes] if wants.pools and pool else []
        ledger = self.facts["ledger"] if "poisoned" in wants.needs else ""
        whole = self.facts["shards"] if wants.whole else ""
        return spec.digest([spec.text(entry), code_digest(), self.inputs.uid, sha256, files, drawn, ledger, whole])


@dataclass(frozen=True)
class _Made:
    """The columns of an earlier run, and of each what it was made of, and what it took."""

    of: dict[str, str]
    columns: dict[str, np.ndarray]
    took: dict[str, list[float]]


NOTHING = _Made({}, {}, {})


def _made(path: str) -> _Made:
    if not exists(path):
        return NOTHING
    try:
        table = sidecars.read(path, ("uid",), "")
        facts = json.loads((table.schema.metadata or {})[b"mithridate"])
        columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in facts["of"]}
        return _Made(facts["of"], columns, {name: facts["took"][name] for name in columns})
    except (InputError, ValueError, KeyError, TypeError):  # of another version, or cut off
        return NOTHING


def _write(path: str, who: np.ndarray, columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    import pyarrow as pa

    table = pa.table({"uid": pa.array(who, pa.string()), **{n: pa.array(v) for n, v in columns.items()}})
    sidecars.save(path, table.replace_schema_metadata({"mithridate": json.dumps(facts)}))


if __name__ == "__main__":
    from pipeline.cli import run

    run("score")

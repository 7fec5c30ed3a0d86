"""The confound probe: can a classifier find the poisons by how they are encoded, without looking at what they say?

If it can, a detector that does well here may have learned our injection and not the attack. Facts of encoding (header,
size, json layout) must tell nothing; colours and caption are the attack's own and are reported for comparison.

Trade-off: poisons are compared with random clean pairs, so an attack that chooses its pairs by what correlates with
encoding (one source, one class) is called a leak too. An image that stands for many pairs counts once, or it would be
found by its repetition.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from pipeline import ledger as ledgers
from pipeline.arguments import Shards
from pipeline.draw import hash64
from pipeline.errors import InputError
from pipeline.facts import IMAGE_FACTS, NAMES, TEXT_FACTS, facts
from pipeline.progress import console
from pipeline.quality import quality
from pipeline.shard_map import each, succeeded
from pipeline.shards import Shard, UidRule, list_shards, samples, uids
from pipeline.shards.store import absolute, join, make_folder, write

FEWEST = 20  # poisons, below which an AUROC means nothing
MOST = 5_000  # poisons that are looked at; more make no interval narrower that matters
FOLDS = 5
MISSING = -1e9
SHOWN = 3  # most telling facts of a family

ENCODING = ("header", "size", "json")
FAMILIES = {"encoding": ENCODING, **{family: (family,) for family in (*ENCODING, "colour", "caption")}}


def probe(
    poisoned: Shards,
    out: Annotated[str | None, tyro.conf.arg(metavar="OUT")] = None,
    /,
    *,
    ledger: str | None = None,
    clean: int = 20,
    fail_above: float = 0.6,
    seed: int = 0,
    uid: UidRule = "key",
) -> int:
    """Try to tell poisons from clean pairs by facts of their encoding. Exit code 1 if that succeeds, or nothing tells.

    Args:
        poisoned: folder, glob, brace pattern or list file of poisoned shards.
        out: folder for probe.json.
        ledger: default: ledger.parquet beside the shards.
        clean: clean pairs for each poison, drawn from all shards.
        fail_above: AUROC that the lower end of the 95% interval of no encoding family may exceed.
        seed: another seed draws other pairs and other folds.
        uid: how a uid is derived where samples carry none; the same as in the steps before.
    """
    if clean < 1 or not 0.5 <= fail_above <= 1:
        raise InputError("--clean: at least 1; --fail-above: between 0.5 and 1")
    listed = list_shards(poisoned)
    path = ledger or ledgers.beside(listed)
    table = ledgers.read(path)
    images = dict(zip(table.column("uid").to_pylist(), table.column("image_sha256_after").to_pylist(), strict=True))
    chosen = _smallest(np.asarray([hash64(seed, "probe", u) for u in images], np.uint64), MOST)
    known = {u for u, keep in zip(images, chosen, strict=True) if keep}
    found = _collect(listed, known, set(images), (clean + 1) * len(known), seed, uid)
    poisons = int(found.poisoned.sum())
    if known and not poisons:
        raise InputError(f"{path}: none of its pairs is in these shards; are they of another dataset or --uid?")
    result: dict[str, Any] = {"poisons": poisons, "seed": seed, "fail_above": fail_above, "ledger": path}
    result |= tell_all(found, [images.get(u) for u in found.uid], seed)
    leaks = [n for n in ("encoding", *ENCODING) if (result["families"][n]["auroc_low"] or 0) > fail_above]
    told = [n for n in ("encoding", *ENCODING) if result["families"][n]["auroc"] is not None]
    result["leaks"] = leaks
    _print(result)
    if out:
        make_folder(out := absolute(out))
        write(join(out, "probe.json"), json.dumps(result, indent=1).encode())
    if leaks:
        console.print(f"our own injection leaks: poisons are found by {', '.join(leaks)}; a detector may learn that")
    elif not told:
        console.print(f"cannot tell: this takes {FEWEST} poisons with images of their own, and as many clean pairs")
    elif untold := [n for n in ENCODING if n not in told]:
        console.print(f"{', '.join(untold)} cannot be told: fewer than {FEWEST} poisons have an image of their own")
    return int(bool(leaks) or not told)


# Pairs


@dataclass(frozen=True)
class Pairs:
    """`values` float32[n, len(NAMES)], NaN where a fact is missing."""

    read: int
    uid: list[str]
    poisoned: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class _Hashes:
    read: int
    clean: np.ndarray


@dataclass(frozen=True)
class _Draw:
    """The smallest hashes of the clean pairs of a shard; images are not read."""

    seed: int
    uid: UidRule
    size: int

    def __call__(self, shard: Shard, poisons: set[str]) -> _Hashes:
        who = uids(shard, self.uid)
        hashes = np.asarray([hash64(self.seed, "probe", u) for u in who if u not in poisons], np.uint64)
        return _Hashes(len(who), np.sort(hashes)[: self.size])


@dataclass(frozen=True)
class _Facts:
    """The facts of the poisons of a shard, and of its clean pairs with hashes up to `below`."""

    seed: int
    uid: UidRule
    below: int

    def __call__(self, shard: Shard, known: set[str], poisons: set[str]) -> Pairs:
        who: list[str] = []
        rows, read = [np.empty((0, len(NAMES)), np.float32)], 0
        for sample in samples(shard, self.uid):
            read += 1
            if sample.uid in known or (
                sample.uid not in poisons and hash64(self.seed, "probe", sample.uid) <= self.below
            ):
                found = facts(sample)
                who.append(sample.uid)
                rows.append(np.asarray([[found.get(name, np.nan) for name in NAMES]], np.float32))
        return Pairs(read, who, np.asarray([u in known for u in who], bool), np.concatenate(rows))


def _collect(shards: Sequence[Shard], known: set[str], poisons: set[str], size: int, seed: int, uid: UidRule) -> Pairs:
    """The poisons `known` and `size` random pairs that are none of `poisons`, ordered by uid."""
    hashes = np.empty(0, np.uint64)
    for _, drawn in succeeded(each("draw", shards, _Draw(seed, uid, size), poisons)):
        hashes = np.sort(np.concatenate([hashes, drawn.clean]))[:size]
    below = int(hashes[-1]) if len(hashes) else -1
    found: list[Pairs] = [
        pairs for _, pairs in succeeded(each("facts", shards, _Facts(seed, uid, below), known, poisons))
    ]
    who = [u for pairs in found for u in pairs.uid]
    order = sorted(range(len(who)), key=who.__getitem__)
    return Pairs(
        sum(pairs.read for pairs in found),
        [who[i] for i in order],
        np.concatenate([pairs.poisoned for pairs in found])[order],
        np.concatenate([pairs.values for pairs in found])[order],
    )


def _smallest(hashes: np.ndarray, size: int) -> np.ndarray:
    return np.argsort(np.argsort(hashes)) < size


def _first_of_each(images: Sequence[str | None], poisoned: np.ndarray) -> np.ndarray:
    """Clean pairs, and of poisons that share an image the first."""
    seen: set[str | None] = set()
    keep = np.ones(len(images), bool)
    for row in np.flatnonzero(poisoned):
        keep[row] = images[int(row)] not in seen
        seen.add(images[int(row)])
    return keep


# Verdict


def tell_all(found: Pairs, images: Sequence[str | None], seed: int) -> dict[str, Any]:
    """`tell` of each family, and of the control: as many clean pairs in the poisons' place; and how many `clean` ones
    were compared with. `images` are digests: of poisons that share one the first counts."""
    once, poisons = _first_of_each(images, found.poisoned), int(found.poisoned.sum())
    drawn = np.flatnonzero(~found.poisoned)
    mock = np.zeros(len(found.uid), bool)
    mock[np.random.default_rng(seed).permutation(drawn)[:poisons]] = True
    real = ~mock if len(drawn) >= 2 * poisons else np.ones(len(mock), bool)
    families = {
        name: tell(found, found.poisoned, real & (once if {"header", "size", "colour"} & set(of) else True), of, seed)
        for name, of in FAMILIES.items()
    }
    control = tell(found, mock, ~found.poisoned, tuple(IMAGE_FACTS | TEXT_FACTS), seed)
    return {"clean": int((real & ~found.poisoned).sum()), "families": families, "control": control}


def tell(found: Pairs, positive: np.ndarray, rows: np.ndarray, families: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Cross-validated AUROC of gradient boosting on the facts of these families, over these rows.

    `facts` are those that tell most alone, whichever way round."""
    from sklearn.metrics import roc_auc_score

    columns = [i for i, name in enumerate(NAMES) if name.split(".")[0] in families]
    values = np.nan_to_num(found.values[rows][:, columns], nan=MISSING)  # sklearn fails where all are missing
    labels = positive[rows]
    who = np.asarray(found.uid, object)[rows]
    hits = int(labels.sum())
    row: dict[str, Any] = {"n": len(labels), "poisons": hits, "auroc": None, "auroc_low": None, "auroc_high": None}
    if hits < FEWEST or len(labels) - hits < FEWEST:
        return {**row, "facts": []}
    scores = _out_of_fold(values, labels, seed)
    told = quality(scores, who, labels)
    single = []
    for i, column in enumerate(columns):
        alone = float(roc_auc_score(labels, values[:, i]))
        single.append((max(alone, 1 - alone), NAMES[column]))
    best = [{"fact": fact, "auroc": auroc} for auroc, fact in sorted(single, reverse=True)[:SHOWN]]
    return row | {name: told[name] for name in ("auroc", "auroc_low", "auroc_high")} | {"facts": best}


def _out_of_fold(values: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    scores = np.zeros(len(labels))
    with threadpool_limits(1, "openmp"):  # more of them wait for each other thousands of times
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(values, labels):
            model = HistGradientBoostingClassifier(
                max_iter=60, max_leaf_nodes=15, min_samples_leaf=8, class_weight="balanced", random_state=seed
            )
            model.set_params(early_stopping=False)
            scores[test] = model.fit(values[train], labels[train]).decision_function(values[test])
    return scores


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None)
    for name, side in (
        ("facts of", "left"),
        ("poisons", "right"),
        ("AUROC", "right"),
        ("95%", "left"),
        ("telling", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for name, row in [*result["families"].items(), ("control", result["control"])]:
        if row["auroc"] is None:
            table.add_row(name, f"{row['poisons']:,}", "", "too few to tell")
            continue
        telling = ", ".join(f"{fact['fact']} {fact['auroc']:.2f}" for fact in row["facts"] if fact["auroc"] > 0.55)
        interval = f"{row['auroc_low']:.2f} to {row['auroc_high']:.2f}"
        table.add_row(name, f"{row['poisons']:,}", f"{row['auroc']:.3f}", interval, telling)
    console.print(table)
    console.print(
        f"against {result['clean']:,} clean pairs; control: random clean pairs in the poisons' place, all facts"
    )


if __name__ == "__main__":
    from pipeline.cli import run

    run("probe")

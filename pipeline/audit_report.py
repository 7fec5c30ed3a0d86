"""What the report of an audit shows: the pairs that findings name, with their pictures, scores and history.

Trade-off: shards that have a pair to show are read once more, for its picture; the columns that were kept have the
rest. How many pairs are shown and listed is bounded, whatever the findings have.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from filters.listed import List, unwanted
from pipeline import ledger as ledgers
from pipeline import sidecars
from pipeline.audit_columns import Rows, Source
from pipeline.audit_lists import Removal, quoted, shown
from pipeline.audit_nearest import IMAGE, Place, nearest
from pipeline.audits._audit import CAPTION, About, Found
from pipeline.audits._schema import Audited
from pipeline.columns import read_columns
from pipeline.report import thumbnail
from pipeline.report.audit import Known, Members, Pair, Selection, render_audit
from pipeline.shard_map import each, succeeded
from pipeline.shards import Shard
from pipeline.shards.store import join, write

TILES, ROWS = 48, 200  # of a finding
PICTURES = 1_500  # of a page: some 9 MB of photographs
LISTED, LISTED_IN_ALL = 100_000, 400_000  # uids of a finding and of a page: 21 bytes each
SELECTED = "removal"  # what a reader selects is called so


def write_report(
    audited: Audited,
    found: Mapping[str, Found],
    shards: Sequence[Shard],
    about: About,
    source: Source,
    columns: Collection[str],
    ledger: str | None,
) -> None:
    """Write OUT/report.html; `found` is by AUDIT-KIND, `columns` are "scores" and IMAGE, as far as they are there."""
    named = {
        name: one.members.with_columns(size=pl.len().over("group"))
        for name, one in found.items()
        if one.members is not None and one.members.height
    }
    tiles = {name: shown(members, min(TILES, PICTURES // len(named))) for name, members in named.items()}
    places = {place for of in tiles.values() for place in of.select("shard", "uid").iter_rows()}
    known = _known(shards, about, source, columns, ledger, places)
    removal = Removal(audited.dataset.where, source.out)
    members = {}
    left = LISTED_IN_ALL
    for name, of in sorted(
        named.items(), key=lambda item: item[1].height
    ):  # more lists are whole if short ones are first
        told = Members(
            [_pair(row, known) for row in tiles[name].iter_rows(named=True)] if about.images else (),
            [_pair(row, {}) for row in shown(of, ROWS).iter_rows(named=True)],
            of["group"].n_unique(),
        )
        if about.images and found[name].remedy is None:
            told = replace(told, **_removable(of, found[name].keep, join(source.out, f"findings/{name}.parquet"), left))
            left -= len(told.listed or b"") // 16
        members[name] = told
    file = f"{SELECTED}.csv"
    selection = Selection(
        file, removal.scoring(SELECTED), quoted(removal.scores(SELECTED)), SELECTED, removal.filter(SELECTED)
    )
    from pipeline.cli import version_text

    page = render_audit(audited, members, _reasons(named, places), selection, version_text())
    write(join(source.out, "report.html"), page.encode("utf-8", "replace"))


def _removable(members: pl.DataFrame, keep: int, path: str, left: int) -> dict[str, Any]:
    """What Members says of a list that a reader may select; `left` uids still fit into the page."""
    gone = unwanted([List(members["uid"], members["group"], keep)])
    rows = members.select("uid", "group").unique()
    rows = rows.sort("group", "uid") if keep else rows.select("uid").unique().sort("uid")
    whole = rows.height <= min(LISTED, left)
    sizes = rows.group_by("group", maintain_order=True).len()["len"].to_list() if keep and whole else ()
    uids = bytes.fromhex("".join(rows["uid"])) if whole else None
    return {"removes": len(gone), "listed": uids, "sizes": tuple(sizes), "keep": keep, "file": path}


def _pair(row: Mapping[str, object], known: Mapping[Place, Known]) -> Pair:
    columns = ("uid", "shard", "group", "size", "caption", "reason")
    told = {name: row[name] for name in columns}
    return Pair(**told, known=known.get((str(row["shard"]), str(row["uid"])), Known()))  # type: ignore[arg-type]


def _reasons(named: Mapping[str, pl.DataFrame], places: set[Place]) -> dict[Place, list[tuple[str, str]]]:
    """Of each of these pairs the findings that it is in."""
    uids = [uid for _, uid in places]
    out: dict[Place, list[tuple[str, str]]] = {place: [] for place in sorted(places)}
    for name, members in named.items():
        about = members.filter(pl.col("uid").is_in(uids)).unique(["shard", "uid"], keep="first", maintain_order=True)
        for shard, uid, reason in about.select("shard", "uid", "reason").iter_rows():
            if (shard, uid) in out:
                out[shard, uid].append((name, reason))
    return out


# From the shards


def _known(
    shards: Sequence[Shard],
    about: About,
    source: Source,
    columns: Collection[str],
    ledger: str | None,
    places: set[Place],
) -> dict[Place, Known]:
    wanted: dict[str, set[str]] = {}
    for name, uid in places:
        wanted.setdefault(name, set()).add(uid)
    before: dict[str, dict[str, object]] = {}
    if ledger:
        rows = ledgers.rows_of(ledgers.read(ledger), sorted({uid for _, uid in places}))
        before = {row["uid"]: row for row in rows}
    some = [shard for shard in shards if shard.name in wanted]
    look = _Look(source, about.sha256, columns)
    out: dict[Place, Known] = {}
    features: dict[Place, np.ndarray] = {}
    pictures = each("pictures", some, look, wanted, before)
    for shard, found in succeeded(pictures, most=len(some)):  # a shard that is gone by now shows no picture
        out |= {(shard.name, uid): one for uid, one in found.of.items()}
        features |= {(shard.name, uid): row for uid, row in found.features.items()}
    for place, near in nearest(shards, source, about.sha256, features).items():
        out[place] = replace(out[place], nearest=near)
    return out


@dataclass(frozen=True)
class _Found:
    read: int
    of: Mapping[str, Known]
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Look:
    """What is known of pairs of a shard."""

    source: Source
    sha256: Mapping[str, str]
    columns: Collection[str]

    def __call__(
        self, shard: Shard, wanted: Mapping[str, set[str]], before: Mapping[str, Mapping[str, object]]
    ) -> _Found:
        uids = sorted(wanted[shard.name])
        rows = self.source.rows(shard, self.sha256[shard.file], self.columns, ())
        pictures = {}
        if not self.source.metadata:
            images = read_columns(shard, self.source.inputs.uid, {"image"}, uids)
            pictures = {uid: thumbnail(image or b"") for uid, image in zip(images["uid"], images["image"], strict=True)}
        at = sidecars.rows_of(uids, rows.uid)
        scores = {
            uid: {name: float(values[row]) for name, values in rows.scores.items()}
            for uid, row in zip(uids, at, strict=True)
        }
        told = {
            uid: Known(pictures.get(uid), _facts(rows, row), scores[uid], before.get(uid))
            for uid, row in zip(uids, at.tolist(), strict=True)
        }
        features = zip(uids, rows.image_embedding[at], strict=True) if IMAGE in self.columns else ()
        return _Found(len(told), told, dict(features))


def _facts(rows: Rows, row: int) -> dict[str, str]:
    """What its record says, as far as there is something."""
    out = {}
    if len(rows.size) and np.isfinite(rows.size[row]).all():
        out["size"] = "{:.0f} × {:.0f}".format(*rows.size[row])
    if len(rows.url) and rows.url[row]:
        out["url"] = str(rows.url[row])[:CAPTION]
    if len(rows.published_similarity) and np.isfinite(rows.published_similarity[row]):
        out["published similarity"] = f"{rows.published_similarity[row]:.3f}"
    if len(rows.hash_agrees) and np.isfinite(rows.hash_agrees[row]):
        out["published hash"] = "agrees" if rows.hash_agrees[row] else "is of another image"
    if len(rows.image_sha256) and rows.image_sha256[row]:
        out["image sha256"] = str(rows.image_sha256[row])
    return out

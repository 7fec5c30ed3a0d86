"""What audits see of a shard: its columns, read once and kept beside the report, and what other jobs know of its pairs.

Trade-off: a copy of captions, URLs and small facts (some 400 bytes a pair, without an image) is the price for decoding
every image once, however many audits look, and again only where a shard has changed.

A table of metadata (LAION's, DataComp's, COYO's, img2dataset's, …) is audited like a shard whose images are unknown.
"""

import collections
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from filters._batch import Batch
from pipeline import sidecars
from pipeline.columns import read_columns
from pipeline.errors import InputError
from pipeline.inputs import EMBEDDED, Inputs
from pipeline.metadata import list_metadata, read
from pipeline.scored import Scored
from pipeline.shard_map import check_made_from
from pipeline.shards import Counts, Shard, UidRule, list_shards, manifest
from pipeline.shards.sample import check_unique
from pipeline.shards.store import join, view
from pipeline.tables import IMAGE, MAX_TEXT, column, domain

if TYPE_CHECKING:
    import polars as pl

OF_METADATA = ("caption", "domain", "published_similarity", "size", "uid", "url")
OF_IMAGES = ("decoded", "facts", "hash_agrees", "image_hash", "image_sha256")
CONTENT = ("caption", "published_similarity", "size", "url", *OF_IMAGES)
_HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#]*@)?(\[[^\]/?#]*\]|[^/?#:]*)"


def _none() -> np.ndarray:
    return np.empty(0, object)


@dataclass(frozen=True)
class Rows(Batch):
    """n pairs of a shard; besides the columns of `Batch` these, empty where not known.

    domain: str[n], registrable, "" unknown. scores: float32[n] by FOLDER:detector.
    """

    shard: str = ""
    domain: np.ndarray = field(default_factory=_none)
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)


def list_inputs(where: str) -> tuple[list[Shard], bool]:
    """The shards, or the tables of metadata, and whether it is these. Raises InputError where there is neither."""
    if where.endswith((".csv", ".tsv")):
        return [Shard(path) for path in list_metadata(where)], True
    try:
        shards = list_shards(where)
    except InputError as error:
        try:
            return [Shard(path) for path in list_metadata(where)], True
        except InputError:
            raise error from None
    tables = [shard for shard in shards if shard.format == "parquet" and not _has_images(shard)]
    if tables and len(tables) < len(shards):
        raise InputError(f"{tables[0].path} has no images, other shards have; audit them apart")
    return shards, bool(tables)


def _has_images(shard: Shard) -> bool:
    """Whether it has a column for them; a file that cannot be read is a damaged shard, not a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(pa.BufferReader(pa.py_buffer(view(shard.path)))).names
    except (pa.ArrowException, OSError, InputError, UnicodeDecodeError):
        return True
    return column(names, IMAGE) is not None


def sha256_of_file(shard: Shard) -> str:
    """Of a table, which has no manifest."""
    return hashlib.sha256(view(shard.path)).hexdigest()


@dataclass(frozen=True)
class Columns:
    """Write OUT/<shard>.columns.parquet."""

    uid: UidRule
    metadata: bool

    def __call__(self, shard: Shard, out: str) -> Counts:
        import pyarrow as pa

        counts = Counts(output=f"{shard.name}.columns.parquet")
        table = self._of_metadata(shard, counts) if self.metadata else self._of_shard(shard, counts)
        urls = table.column("url")
        table = table.append_column("domain", pa.array(_domains(urls).to_arrow(), pa.string()))
        sidecars.save(join(out, counts.output), table, compression="zstd")
        return counts

    def _of_shard(self, shard: Shard, counts: Counts) -> Any:
        import pyarrow as pa

        content = manifest(shard, self.uid)
        check_unique(content.uids, shard.path)
        counts.input_sha256, told = content.sha256, read_columns(shard, self.uid, CONTENT)
        counts.read = counts.out = len(told["uid"])
        told["caption"][:] = [caption and caption[:MAX_TEXT] for caption in told["caption"]]
        return pa.table({name: _arrow(values) for name, values in told.items()})

    def _of_metadata(self, shard: Shard, counts: Counts) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        counts.input_sha256 = sha256_of_file(shard)
        parts = []
        lost, unusable = collections.Counter[str](), collections.Counter[str]()
        for rows in read(shard.path, ("uid", "url", "caption", "width", "height", "similarity")):
            for why, n in rows.invalid.items():
                (lost if why.startswith("line: ") else unusable)[why] += n
            table = rows.table
            named = table.column("uid").is_valid() if "uid" in table.column_names else pa.array(np.zeros(len(table)))
            table = table.filter(pc.cast(named, pa.bool_()))
            lost["row without a uid, and without a url to make one of"] += len(named) - len(table)
            counts.out += len(table)
            parts.append(_canonical(table))
        counts.reasons, counts.failed = dict(+lost), lost.total()
        counts.read = counts.out + counts.failed
        counts.facts = {"unusable": dict(unusable)}
        return pa.concat_tables(parts) if parts else _canonical(pa.table({}))


def _arrow(values: np.ndarray) -> Any:
    import pyarrow as pa

    if values.ndim == 2:
        return sidecars.fixed(values)
    return pa.array(values, pa.string()) if values.dtype == object else pa.array(values)


def _canonical(table: Any) -> Any:
    """The columns of OF_METADATA but the domain, nulls where the table has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    n, have = len(table), table.column_names
    texts = {name: table.column(name) if name in have else pa.nulls(n, pa.string()) for name in ("uid", "caption")}
    blank = pc.match_substring_regex(texts["caption"], r"^\s*$")
    texts["caption"] = pc.if_else(blank, pa.scalar(None, pa.string()), texts["caption"])  # as of a shard
    url = table.column("url").fill_null("") if "url" in have else pa.array([""] * n, pa.string())
    numbers = {
        name: table.column(name).to_numpy().astype(np.float32) if name in have else np.full(n, np.nan, np.float32)
        for name in ("width", "height", "similarity")
    }
    size = sidecars.fixed(np.stack([numbers["width"], numbers["height"]], axis=1))
    return pa.table({**texts, "url": url, "size": size, "published_similarity": pa.array(numbers["similarity"])})


def _domains(urls: Any) -> "pl.Series":
    """The registrable domain of each URL; a host is looked up once."""
    import polars as pl

    hosts = pl.Series("host", pl.from_arrow(urls), pl.String).str.extract(_HOST).fill_null("")
    known = hosts.unique().to_list()
    return hosts.replace_strict(known, [domain(f"http://{host}") for host in known], return_dtype=pl.String)


@dataclass(frozen=True)
class Source:
    """Where the columns of a shard are, and what is known besides; "" and () where nothing is."""

    out: str
    inputs: Inputs
    scores: tuple[str, ...]
    metadata: bool

    def rows(self, shard: Shard, sha256: str, wanted: Collection[str], known: Collection[str]) -> Rows:
        """`known` poisons make `poisoned`. Raises InputError where embeddings or scores are of other bytes."""
        table = sidecars.read(join(self.out, f"{shard.name}.columns.parquet"), ("uid",), "run the same command again")
        told: dict[str, Any] = {name: _numpy(table.column(name)) for name in table.column_names}
        if set(EMBEDDED) & set(wanted):
            check_made_from(self.inputs.embeddings, shard, sha256, "run `mithridate embed` on them")
            found, _ = self.inputs.batch(shard, told["uid"], set(EMBEDDED) & set(wanted))
            told |= {name: getattr(found, name) for name in EMBEDDED if name in wanted}
        if "poisoned" in wanted:
            told["poisoned"] = np.asarray([who in known for who in told["uid"]], bool)
        if "scores" in wanted:
            told["scores"] = self._scores(shard, told["uid"], sha256)
        return Rows(**told, shard=shard.name)

    def _scores(self, shard: Shard, who: Sequence[str], sha256: str) -> dict[str, np.ndarray]:
        for folder in self.scores:
            check_made_from(folder, shard, sha256, "run `mithridate score` on them")
        found = Scored(self.scores).read(shard.name)
        rows = sidecars.rows_of(who, found.pop("uid"))
        return {name: np.where(rows < 0, np.float32(np.nan), values[rows]) for name, values in found.items()}


def _numpy(values: Any) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(values.type):
        return sidecars.matrix(values)
    return np.asarray(values.to_numpy(zero_copy_only=False))

"""Metadata tables without images, as LAION, DataComp, COYO, CC3M/CC12M and img2dataset publish them, under one schema.

    for rows in read("laion/part-00000.parquet"):
        rows.table     # pyarrow, canonical columns (pipeline/tables.py) where the source has them
        rows.invalid   # {"similarity: out of range": 3}: what became null here, and why

Trade-off: a row is never dropped for a bad value, and nothing needs a whole file, or a whole row group, in memory. A
batch has at most MAX_ROWS rows and BATCH_BYTES bytes of text. Where the text of a row group fits into BATCH_BYTES it
is read as dictionaries, so that one long value repeated a million times is seen before it is spelled out; larger row
groups are read in steps sized by what the footer declares, and only there a footer that lies can exceed the bound.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.npy import read_npy
from pipeline.shard_map import code_digest
from pipeline.shards.store import (
    Shard,
    absolute,
    exists,
    glob,
    is_folder,
    is_sidecar,
    is_url,
    join,
    stamp,
    view,
    whole,
    write,
)
from pipeline.spec import digest
from pipeline.tables import (
    JOINS,
    MAX_TEXT,
    METADATA,
    SNIFFED,
    TextLayout,
    canonical,
    canonical_names,
    lengths,
    own_names,
    text_layout,
)

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 65_536
BATCH_BYTES = 256 * 1024**2
LINE_BYTES = 8 * 1024**2  # a block of csv; no line may be longer
FORMATS = (".parquet", ".tsv", ".csv")
EVIDENCE = ("sha256", "md5", "phash", "similarity")
MAX_SAME = 64  # rows looked at for one key: a URL occurs often, but its rows say the same
PROBES = 64  # keys of a shard that tell in which file to look first

UidRule = Literal["published", "sha256(url, text)"]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file.

    `first` is the number of the first row (in text files, among the readable lines). `sources` maps canonical columns
    to the file's own names. `uid_rule` says whether uids are the file's or derived. `invalid` counts values that are
    null in `table`, by "column: reason", and lines that could not be read."""

    table: "pa.Table"
    first: int
    sources: dict[str, str]
    uid_rule: UidRule
    invalid: dict[str, int]


def list_metadata(where: str) -> list[str]:
    """Metadata files of a folder, a glob or one file, as absolute paths in order.

    Raises InputError where there is none, or one is not parquet, tsv or csv."""
    if any(c in where for c in "*?["):
        found = glob(where)
    elif is_folder(where):
        found = sorted(path for kind in FORMATS for path in glob(join(where, f"*{kind}")) if not is_sidecar(path))
    else:
        found = [where] if exists(where) else []
    if not found:
        raise InputError(f"{where}: no metadata here; expected {', '.join(FORMATS)} files")
    if strange := [path for path in found if not path.endswith(FORMATS)]:
        raise InputError(f"{strange[0]}: not metadata; expected {', '.join(FORMATS)}")
    return [absolute(path) for path in found]


def sources(path: str) -> dict[str, str]:
    """Canonical column -> the name it has in this file. Raises InputError where no column is known."""
    if path.endswith(".parquet"):
        with _parquet(path) as file:
            return canonical_names(path, file.schema_arrow.names)
    with _readable(path):
        return canonical_names(path, _layout(path).names)


def read(path: str, only: Sequence[str] = tuple(METADATA)) -> Iterator[Rows]:
    """The rows of a metadata file in bounded batches, with those canonical columns of `only` that the file has.

    A file without uids gets them by rule: the first 32 hex digits of sha256 over url, a zero byte and text. Rows that
    img2dataset failed to download are rows too; `status` tells. Raises InputError, naming the file, where it cannot be
    read.
    """
    first = 0
    for names, batch, unread in _batches(path, only):
        for start, end in _slices(batch):
            table, invalid = canonical(batch.slice(start, end - start), names, only)
            rule: UidRule = "published" if "uid" in names else "sha256(url, text)"
            yield Rows(table, first, names, rule, invalid | unread)
            first, unread = first + end - start, {}


def take(path: str, rows: np.ndarray, only: Sequence[str]) -> "pa.Table":
    """Canonical rows by number (int64[n], ascending, distinct) of a parquet file; reads only their row groups.

    Raises InputError where the file has changed since the numbers were noted."""
    import pyarrow as pa

    found: list[pa.Table] = []
    with _parquet(path) as file:
        names = canonical_names(path, file.schema_arrow.names)
        starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        if len(rows) and rows[-1] >= starts[-1]:
            raise InputError(f"{path}: has fewer rows than when it was indexed; run the same command again")
        for group in np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist():
            first = int(starts[group])
            for batch in _steps(file, group, names, only):
                low, high = np.searchsorted(rows, [first, first + batch.num_rows])
                if high > low:
                    wanted = batch.take(pa.array(rows[low:high] - first))
                    found += [canonical(wanted.slice(a, b - a), names, only)[0] for a, b in _slices(wanted)]
                first += batch.num_rows
    return pa.concat_tables(found)


def _batches(path: str, only: Sequence[str]) -> "Iterator[tuple[dict[str, str], pa.RecordBatch, dict[str, int]]]":
    """Sources, the file's own columns, and the lines that were skipped before them."""
    if not path.endswith(".parquet"):
        yield from _lines(path, only)
        return
    with _parquet(path) as file:
        names = canonical_names(path, file.schema_arrow.names)
        for group in range(file.num_row_groups):
            for batch in _steps(file, group, names, only):
                yield names, batch, {}


@contextmanager
def _readable(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as metadata ({str(error)[:200]}); fetch it again") from error


def _open(path: str) -> Any:
    """A file of pyarrow's: mapped where it is local, read by ranges where it is not."""
    import fsspec
    import pyarrow as pa

    return pa.PythonFile(fsspec.open(path, "rb").open(), "r") if is_url(path) else pa.memory_map(path)


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _readable(path), _open(path) as source:
        plain = pq.ParquetFile(source)
        texts = {alias for spec in METADATA.values() if spec.kind == "text" for alias in spec.aliases}
        texts &= set(plain.schema_arrow.names)
        groups = range(plain.num_row_groups)
        small = all(_declared(plain, group, texts) <= BATCH_BYTES for group in groups)
        yield pq.ParquetFile(source, metadata=plain.metadata, read_dictionary=sorted(texts)) if small else plain


def _declared(file: Any, group: int, names: set[str]) -> int:
    """Uncompressed bytes of some columns of a row group, as the footer has it."""
    chunks = file.metadata.row_group(group)
    found = (chunks.column(i) for i in range(chunks.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in found if chunk.path_in_schema in names)


def _steps(file: Any, group: int, names: dict[str, str], only: Sequence[str]) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    # A nested column is of the wrong type whatever it holds, so it is not decoded.
    schema = file.schema_arrow
    own = own_names(names, only)
    flat = [name for name in own if not pa.types.is_nested(schema.field(name).type)]
    rows = max(file.metadata.row_group(group).num_rows, 1)
    step = BATCH_BYTES * rows // max(_declared(file, group, set(flat)), 1)
    for batch in file.iter_batches(min(max(step, 1), MAX_ROWS), row_groups=[group], columns=flat, use_threads=False):
        undecoded = {name: pa.array(np.zeros(batch.num_rows, bool)) for name in own if name not in flat}
        yield pa.record_batch({**dict(zip(flat, batch.columns, strict=True)), **undecoded})


def _slices(batch: "pa.RecordBatch") -> list[tuple[int, int]]:
    """[start, end) of parts that hold at most MAX_ROWS rows and BATCH_BYTES bytes of text once spelled out."""
    weight = np.zeros(batch.num_rows, np.int64)
    for values in batch.columns:
        size = lengths(values)
        weight += np.where(size > MAX_TEXT, 0, size)
    parts: list[tuple[int, int]] = []
    start = 0
    total = np.cumsum(weight)
    while start < batch.num_rows or not parts:
        before = int(total[start - 1]) if start else 0
        end = int(np.searchsorted(total, before + BATCH_BYTES, side="right"))
        end = min(max(end, start + 1), start + MAX_ROWS, batch.num_rows)
        parts.append((start, end))
        start = end
    return parts


def _layout(path: str) -> TextLayout:
    with _open(path) as file:
        return text_layout(path, file.read(SNIFFED))


def _lines(path: str, only: Sequence[str]) -> "Iterator[tuple[dict[str, str], pa.RecordBatch, dict[str, int]]]":
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    skipped: Counter[str] = Counter()

    def skip(row: Any) -> str:
        skipped[f"line: {row.actual_columns} fields instead of {row.expected_columns}"] += 1
        return "skip"

    with _readable(path), _open(path) as source:
        layout = _layout(path)
        names = canonical_names(path, layout.names)
        own = own_names(names, only)
        quoted = layout.delimiter == ","
        types = dict.fromkeys(layout.names, pa.binary())  # what is no UTF-8 costs its value, not the file
        reader = arrow_csv.open_csv(
            source,
            arrow_csv.ReadOptions(
                use_threads=False, block_size=LINE_BYTES, column_names=layout.names, skip_rows=int(layout.header)
            ),
            arrow_csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char=quoted and '"',
                newlines_in_values=quoted,
                invalid_row_handler=skip,
            ),
            arrow_csv.ConvertOptions(
                check_utf8=False, include_columns=own, column_types=types, strings_can_be_null=True, null_values=[""]
            ),
        )
        for batch in reader:
            yield names, batch, dict(skipped)
            skipped.clear()
        if skipped:
            yield names, pa.record_batch([[] for _ in own], reader.schema), dict(skipped)


@dataclass(frozen=True)
class Index:
    """Where the rows of a metadata file are.

    `joins` maps uid, key and url to files of uint64 [2, n]: 64-bit prefixes in order, and their row numbers in `table`
    (the file itself, or a parquet copy of a text file). Rows without an image (status other than success) are not in
    them; `rows` counts those that are, `size` all."""

    source: str
    table: str
    joins: dict[str, str]
    columns: list[str]
    rows: int
    size: int
    invalid: dict[str, int]


def prefixes(texts: Collection[str]) -> np.ndarray:
    """uint64[n] that find a key; whether it is that key is always checked on the text."""
    hashes = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)


def write_join(path: str, parts: Sequence[np.ndarray]) -> None:
    """Save parts of uint64 [2, n], prefixes and their row numbers, as one in the order of both."""
    table = np.concatenate([np.empty((2, 0), np.uint64), *parts], axis=1)
    with whole(path) as file:
        np.save(file, np.ascontiguousarray(table[:, np.lexsort((table[1], table[0]))]), allow_pickle=False)


def lookup(path: str, wanted: np.ndarray) -> list[np.ndarray]:
    """For each of some prefixes the rows that share it, at most MAX_SAME; the file is mapped, not read."""
    table = read_npy(view(path), path)
    low, high = (np.searchsorted(table[0], wanted, side) for side in ("left", "right"))
    return [table[1, a : min(b, a + MAX_SAME)].astype(np.int64) for a, b in zip(low, high, strict=True)]


def index(path: str, folder: str) -> Index:
    """Make the index of a metadata file in `folder`, or find it there. Memory: 16 bytes a row of this file and a batch.

    Raises InputError where the file has none of uid, key and url."""
    base = join(folder, digest({"path": path, "code": code_digest(), **stamp(path)}))
    if exists(f"{base}.json"):
        return Index(**json.loads(bytes(view(f"{base}.json"))))
    names = sources(path)
    joins = [name for name, aliases in JOINS.items() if names.get(name) in aliases]
    if not joins:
        raise InputError(f"{path}: no uid, key or url to find a sample by; its columns are {', '.join(names)}")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in joins}
    invalid: Counter[str] = Counter()
    rows = size = 0
    is_text = not path.endswith(".parquet")
    for part in _copied(path, f"{base}.parquet") if is_text else read(path, (*joins, *EVIDENCE, "status")):
        invalid.update(part.invalid)
        good = _stored(part.table)
        rows, size = rows + int(good.sum()), size + len(good)
        for name in joins:
            at = np.flatnonzero(good & part.table.column(name).is_valid().to_numpy())
            texts = part.table.column(name).take(at).to_pylist()
            parts[name].append(np.stack([prefixes(texts), (at + part.first).astype(np.uint64)]))
    for name in joins:
        write_join(f"{base}.{name}.npy", parts[name])
    files = {name: f"{base}.{name}.npy" for name in joins}
    made = Index(path, f"{base}.parquet" if is_text else path, files, list(names), rows, size, dict(invalid))
    write(f"{base}.json", json.dumps(asdict(made)).encode())
    return made


def _stored(table: "pa.Table") -> np.ndarray:
    """bool[n]: rows that have an image, as far as the table says."""
    import pyarrow.compute as pc

    if "status" not in table.column_names:
        return np.ones(table.num_rows, bool)
    return pc.equal(table.column("status"), "success").fill_null(False).to_numpy()


def _copied(path: str, copy: str) -> Iterator[Rows]:
    """The rows, written to a parquet file on the way: a text file has no way to reach row n but through all before."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(copy) as file:
        writer = None
        for rows in read(path):
            writer = writer or pq.ParquetWriter(pa.PythonFile(file, "w"), rows.table.schema)
            writer.write_table(rows.table)
            yield rows
        if writer:
            writer.close()


def search_order(indexes: Sequence[Index], name: str, by: str, wanted: np.ndarray) -> Iterator[Index]:
    """Files in the order in which to look for a shard's keys: its namesake, then those that hold most of some probes.

    A function of the input alone, so a row that two files hold is found in the same one by every run."""
    usable = [found for found in indexes if by in found.joins]
    yield from (found for found in usable if Shard(found.source).name == name)
    rest = [found for found in usable if Shard(found.source).name != name]
    probes = wanted[:: max(1, len(wanted) // PROBES)]
    hits = {found.source: sum(map(len, lookup(found.joins[by], probes))) for found in rest}
    yield from sorted(rest, key=lambda found: -hits[found.source])


@dataclass(frozen=True)
class Found:
    """A published row: its canonical values, and where it stands (a file, and the row in its index's table)."""

    values: dict[str, Any]
    source: str
    row: int


def find(
    indexes: Sequence[Index], name: str, by: str, wanted: Mapping[int, str], captions: Sequence[str]
) -> dict[int, Found]:
    """The row of each wanted text in column `by`; where several have it, the first with the sample's caption wins.

    `wanted` maps a position in `captions` to the text. Stops at the file that completes the shard named `name`."""
    found: dict[int, Found] = {}
    keys = prefixes(wanted.values())
    for file in search_order(indexes, name, by, keys):
        missing = [at not in found for at in wanted]
        pending = list(compress(wanted, missing))
        hits = lookup(file.joins[by], keys[missing])
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *hits]))
        if len(rows):
            only = [column for column in (*JOINS, "caption", "width", "height", *EVIDENCE) if column in file.columns]
            table = dict(zip(rows.tolist(), take(file.table, rows, only).to_pylist(), strict=True))
            for at, near in zip(pending, hits, strict=True):
                same = [row for row in near.tolist() if table[row].get(by) == wanted[at]]
                if same:
                    best = next((row for row in same if table[row].get("caption") == captions[at]), same[0])
                    found[at] = Found(table[best], file.source, best)
        if len(found) == len(wanted):
            break
    return found

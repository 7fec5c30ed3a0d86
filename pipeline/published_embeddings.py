"""Embeddings that others published, as clip-retrieval and DataComp lay them out, joined to shards by uid.

Trade-off: both layouts pair a parquet row with a matrix row by position alone, and nothing in the files proves it. A
position is believed only inside one partition, once row counts agree and every witness that the metadata offers
(repeated captions, repeated images, published similarities) agrees too. An index of 32 bytes a row, written once, is
the price for never holding more than a shard's own rows and the index of one partition.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.npy import Array, Matrix, read_npy
from pipeline.progress import console
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Rejected, Shard, samples
from pipeline.shards.sample import uid_of
from pipeline.shards.store import is_url, join, stamp, view, whole
from pipeline.spec import digest
from pipeline.tables import UID, column

PublishedModel = Literal["l14", "b32"]
MAX_ROWS = 2**23  # of one partition; those met have half a million to a million
SAME_EMBEDDING = 0.99  # cosine of one caption or image embedded twice, in other batches
SCORE_TOLERANCE = 0.02  # of a published similarity, whose spread over rows is three times as large
# Misaligned rows disagree nearly always. An honest share comes from poison (at most 1% in the literature), repaired
# captions and images that changed between two downloads.
MAX_DISAGREEMENT = 0.05
WITNESSES = 4096  # rows of a partition that are compared; 5% of them stand out by far
_CLIP_RETRIEVAL = {"metadata": "parquet", "img_emb": "npy", "text_emb": "npy"}
_BATCH = 65536
_hit: set[str] = set()  # partitions that served the last shard of this worker: neighbours there are neighbours here


@dataclass(frozen=True)
class Partition:
    """Files whose rows are aligned by position. `name` is the stem of the metadata file."""

    metadata: str
    image: Array
    text: Array

    @property
    def name(self) -> str:
        return Shard(self.metadata).name


@dataclass(frozen=True)
class Published:
    """What a folder holds. `key` and `caption` name metadata columns; `similarity` is one too, or empty.

    `model` names the source: layout, model and a digest of the files' names, sizes and times.
    """

    model: str
    key: tuple[str, ...]
    caption: str
    similarity: str
    partitions: list[Partition]


@dataclass(frozen=True)
class Index:
    """Where each uid's row is: `folder/<partition>.npy`, uint64 [4, n], sorted by uid.

    Rows of the array: first and second half of the uid, row number, fingerprint of the caption. `repeated` is uint64
    [2, m], the sorted uids that occur more than once: which row is meant cannot be known. With `by_key` the metadata
    has no uid, and rows are known by the webdataset key.
    """

    folder: str
    dimension: int
    by_key: bool
    repeated: np.ndarray

    def read(self, partition: str) -> np.ndarray:
        path = join(self.folder, f"{partition}.npy")
        return read_npy(view(path), path)


def find_published(folder: str, model: PublishedModel | None) -> Published:
    """Recognise the layout of a local folder. `model` chooses among DataComp's two (default l14).

    Raises InputError on a missing partner file, a gap in the numbering of partitions, or neither layout.
    """
    if is_url(folder):
        raise InputError(f"{folder}: published embeddings are memory-mapped; copy them to a folder that all nodes see")
    if partitions := _clip_retrieval(folder):
        if model:
            raise InputError(f"{folder}: clip-retrieval publishes one model; leave --model out")
        source = f"clip-retrieval:{_digest(folder, partitions)}"
        return Published(source, ("image_path", "key"), "caption", "", partitions)
    model = model or "l14"
    if partitions := _datacomp(folder, model):
        source, similarity = f"datacomp/{model}:{_digest(folder, partitions)}", f"clip_{model}_similarity_score"
        return Published(source, (), "text", similarity, partitions)
    raise InputError(
        f"{folder}: no published embeddings; expected clip-retrieval's metadata/metadata_0.parquet with img_emb/ and "
        "text_emb/, or DataComp's metadata/<32 hex digits>.parquet with .npz"
    )


def _digest(folder: str, partitions: list[Partition]) -> str:
    files = {path for p in partitions for path in (p.metadata, p.image.path, p.text.path)}
    return digest({path.removeprefix(folder): stamp(path) for path in files})


def make_index(published: Published, out: str) -> Index:
    """Write, or find written, the index of every partition under `out`.

    Raises ShardsFailed with every partition whose files are torn or not aligned.
    """
    metadata = [Shard(partition.metadata) for partition in published.partitions]
    markers = shard_map(Job("index", {"source": published.model}, out), metadata, _index_partition, published)
    dimensions = {m["facts"]["dimension"]: m["output"] for m in markers}
    if len(dimensions) > 1:
        raise InputError(f"{out}: partitions have different widths {dimensions}; they must be of one model")
    rows = sum(m["read"] for m in markers)
    if blind := sum(m["read"] for m in markers if not m["facts"]["witnesses"]):
        console.print(f"  alignment of {blind:,} of {rows:,} rows rests on row counts: nothing repeats in the metadata")
    index = Index(out, next(iter(dimensions)), not any(m["facts"]["uid"] for m in markers), np.empty((2, 0), np.uint64))
    repeated = _repeated_uids(index, [partition.name for partition in published.partitions], rows)
    if repeated.shape[1] > MAX_DISAGREEMENT * rows:
        raise InputError(f"{out}: {repeated.shape[1]:,} uids repeat in {rows:,} published rows; make the keys unique")
    return Index(out, index.dimension, index.by_key, repeated)


def take(shard: Shard, published: Published, index: Index, counts: Counts) -> tuple[list[str], np.ndarray, np.ndarray]:
    """uids, image and text float16 [n, d] of a shard's samples; NaN where none is published, which `counts` explains.

    A row published for another caption is not used either. Raises InputError where that is more than a small share.
    """
    uids, wanted, captions, pending = _wanted(shard, index.by_key, counts)
    image = np.full((len(uids), index.dimension), np.nan, np.float16)
    text = image.copy()
    ambiguous = find(index.repeated, wanted[:, pending]) >= 0
    _fail(counts, "published more than once", int(ambiguous.sum()))
    pending = pending[~ambiguous]
    joined = used = 0
    for partition, found, (rows, published_captions) in _search(published, index, wanted, pending):
        same = published_captions == captions[found]
        joined, used = joined + len(found), used + int(same.sum())
        which = rows[same].astype(np.int64)
        image[found[same]] = partition.image.open().rows(which)
        text[found[same]] = partition.text.open().rows(which)
    if joined - used > MAX_DISAGREEMENT * joined:
        raise InputError(
            f"{shard.path}: {joined - used} of {joined} captions are not those published for the same uid; the "
            "embeddings are misaligned or of other captions: fetch them again, or embed with --checkpoint"
        )
    _fail(counts, "published for another caption", joined - used)
    _fail(counts, "not published", len(pending) - joined)
    return uids, image, text


def _search(
    published: Published, index: Index, wanted: np.ndarray, pending: np.ndarray
) -> Iterator[tuple[Partition, np.ndarray, np.ndarray]]:
    """For every partition that has some of the samples: their numbers, and [row number, caption] of each."""
    hit = set()
    for partition in sorted(published.partitions, key=lambda p: p.name not in _hit):
        if not len(pending):
            break
        table = index.read(partition.name)
        at = find(table[:2], wanted[:, pending])
        there = at >= 0
        if there.any():
            hit.add(partition.name)
            yield partition, pending[there], table[2:, at[there]]
        pending = pending[~there]
    _hit.clear()
    _hit.update(hit)


def find(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Column of each wanted uid (uint64 [2, n]) in a sorted table (uint64 [2, m]), -1 where it is not there."""
    left, right = (np.searchsorted(table[0], wanted[0], side) for side in ("left", "right"))
    for i in np.flatnonzero(right - left > 1):  # uids that share their first half
        left[i] += np.searchsorted(table[1, left[i] : right[i]], wanted[1, i])
    inside = left < right
    inside[inside] = table[1, left[inside]] == wanted[1, inside]
    return np.where(inside, left, -1)


def _clip_retrieval(folder: str) -> list[Partition]:
    """Partitions by number, so that `metadata_0` meets `img_emb_0000`: releases differ in their padding."""
    found = {kind: _numbered(folder, kind) for kind in _CLIP_RETRIEVAL}
    count = max((number + 1 for paths in found.values() for number in paths), default=0)
    for number in range(count):
        for kind, paths in found.items():
            if number not in paths:
                raise InputError(
                    f"{folder}: partition {number} of {count} has no {kind}/{kind}_{number}.{_CLIP_RETRIEVAL[kind]} "
                    "(however padded); fetch it, or its samples would go without embeddings"
                )
    rows = zip(*([paths[n] for n in range(count)] for paths in found.values()), strict=True)
    return [Partition(m, Array(image, normalised=True), Array(text, normalised=True)) for m, image, text in rows]


def _numbered(folder: str, kind: str) -> dict[int, str]:
    paths: dict[int, str] = {}
    for name in _names(join(folder, kind)):
        if match := re.fullmatch(rf"{kind}_([0-9]+)\.{_CLIP_RETRIEVAL[kind]}", name):
            number, path = int(match[1]), join(folder, f"{kind}/{name}")
            if number in paths:
                raise InputError(f"{paths[number]} and {path} are both partition {number}; keep those of one run")
            paths[number] = path
    return paths


def _datacomp(folder: str, model: str) -> list[Partition]:
    found = (re.fullmatch(r"([0-9a-f]{32})\.(parquet|npz)", name) for name in _names(join(folder, "metadata")))
    partitions = []
    for stem in sorted({match[1] for match in found if match}):
        metadata, arrays = (join(folder, f"metadata/{stem}.{suffix}") for suffix in ("parquet", "npz"))
        for path, partner in ((metadata, arrays), (arrays, metadata)):
            if not Path(path).exists():
                raise InputError(f"{path}: no such file, but {partner} is there; fetch both")
        partitions.append(Partition(metadata, Array(arrays, f"{model}_img.npy"), Array(arrays, f"{model}_txt.npy")))
    return partitions


def _names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []


@dataclass(frozen=True)
class _Rows:
    """A partition's metadata in file order; fingerprints are 0 where there is nothing to compare."""

    uid: np.ndarray  # uint64 [2, n]
    caption: np.ndarray  # uint64 [n]
    file: np.ndarray  # uint64 [n], of the downloaded file's sha256
    similarity: np.ndarray  # float32 [n], NaN where unknown
    has_uid: bool


def _index_partition(shard: Shard, out: str, published: Published) -> Counts:
    partition = next(p for p in published.partitions if p.name == shard.name)
    rows = _metadata(shard.path, published)
    counts = Counts(read=len(rows.caption), out=len(rows.caption), output=f"{shard.name}.npy")
    counts.input_sha256 = hashlib.sha256(view(shard.path)).hexdigest()  # here, as it is no shard of samples
    image, text = partition.image.open(), partition.text.open()
    for matrix in (image, text):
        if len(matrix.values) != counts.read:
            raise InputError(
                f"{matrix.where}: {len(matrix.values)} rows, but {shard.path} has {counts.read}; they are aligned by "
                "position: fetch or make both again"
            )
        matrix.rows(_spread(counts.read))  # what is wrong with all rows is found before the first shard
    if image.values.shape != text.values.shape:
        raise InputError(f"{text.where}: not as wide as {image.where}; fetch or make both again")
    witnesses = sum(_check(*evidence) for evidence in _evidence(shard.path, image, text, rows))
    counts.facts = {"dimension": image.values.shape[1], "uid": rows.has_uid, "witnesses": witnesses}
    order = np.lexsort((rows.uid[1], rows.uid[0]))
    with whole(join(out, counts.output)) as file:
        np.save(file, np.stack([*rows.uid[:, order], order.astype(np.uint64), rows.caption[order]]), allow_pickle=False)
    return counts


def _metadata(path: str, published: Published) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(view(path))))
        if file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{path}: {file.metadata.num_rows} rows, more than {MAX_ROWS}; split the partition")
        names = file.schema_arrow.names
        uid, key = column(names, UID), column(names, published.key)
        if published.caption not in names or not (uid or key):
            wanted = " | ".join((*UID, *published.key))
            raise InputError(f"{path}: needs the columns {published.caption} and {wanted}; has {', '.join(names)}")
        used = {uid, key, published.caption, published.similarity, "sha256"}
        batches = file.iter_batches(_BATCH, columns=[name for name in names if name in used])
        parts = [_part(batch, uid, key, published, path) for batch in batches]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); fetch it again") from error
    if not parts:
        raise InputError(f"{path}: no rows; fetch it again")
    uids, captions, files, similarities = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    return _Rows(uids, captions, files, similarities, uid is not None)


def _part(batch: Any, uid: str | None, key: str | None, published: Published, path: str) -> tuple[np.ndarray, ...]:
    """uids, caption and file fingerprints, similarities of one record batch."""
    values = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    nothing = [None] * batch.num_rows
    uids, keys = values.get(uid, nothing), values.get(key, nothing)
    if not key and (bad := [u for u in uids if not re.fullmatch("[0-9a-fA-F]{32}", str(u))]):
        raise InputError(f"{path}: uid {bad[0]!r} is not 32 hex digits; fetch the file again")
    similarity = [np.nan if s is None else s for s in values.get(published.similarity, nothing)]
    return (
        _halves(uid_of(str(k), "", u, "key") for u, k in zip(uids, keys, strict=True)),
        np.asarray([_fingerprint(str(c or "")) for c in values[published.caption]], np.uint64),
        np.asarray([_fingerprint(str(s)) if s else 0 for s in values.get("sha256", nothing)], np.uint64),
        np.asarray(similarity, np.float32),
    )


def _wanted(shard: Shard, by_key: bool, counts: Counts) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """uids, the uids to look up (uint64 [2, n]), caption fingerprints, and the numbers of the samples that have one."""
    uids: list[str] = []
    sought: list[str] = []
    captions: list[int] = []
    pending: list[int] = []
    for sample in samples(shard):
        try:
            captions.append(_fingerprint(sample.caption))
            pending.append(len(uids))
        except Rejected as error:
            captions.append(0)
            _fail(counts, str(error), 1)
        uids.append(sample.uid)
        sought.append(uid_of(sample.key, shard.name, None, "key") if by_key else sample.uid)
    counts.read = len(uids)
    return uids, _halves(sought), np.asarray(captions, np.uint64), np.asarray(pending, np.int64)


def _fail(counts: Counts, reason: str, n: int) -> None:
    if n:
        counts.failed += n
        counts.reasons[reason] = counts.reasons.get(reason, 0) + n


def _repeated_uids(index: Index, partitions: list[str], total: int) -> np.ndarray:
    """uint64 [2, m], sorted. A range of all uids at a time is gathered from every partition, in memory for one."""
    slices = -(-total // MAX_ROWS)
    borders = np.asarray([i * 2**64 // slices for i in range(1, slices)], np.uint64)
    found = [np.empty((2, 0), np.uint64)]
    for i in range(slices):
        parts = []
        for name in partitions:
            uids = index.read(name)[:2]
            cuts = [0, *np.searchsorted(uids[0], borders), uids.shape[1]]
            parts.append(uids[:, cuts[i] : cuts[i + 1]])
        if sum(part.shape[1] for part in parts) > 4 * MAX_ROWS:
            raise InputError(f"{index.folder}: published uids are no hashes: too many start alike")
        uids = np.concatenate(parts, axis=1)
        uids = uids[:, np.lexsort((uids[1], uids[0]))]
        twice = (uids[:, 1:] == uids[:, :-1]).all(0)
        found.append(np.unique(uids[:, 1:][:, twice], axis=1))
    return np.concatenate(found, axis=1)


def _halves(uids: Iterable[str]) -> np.ndarray:
    """uint64 [2, n]: numpy has no 128-bit integers."""
    return np.asarray([(int(u[:16], 16), int(u[16:], 16)) for u in uids], np.uint64).reshape(-1, 2).T


def _fingerprint(text: str) -> int:
    """64 bits of a caption; white space is collapsed, as tokenizers do and as writers of text files do not agree on."""
    blob = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "big")


def _evidence(metadata: str, image: Matrix, text: Matrix, rows: _Rows) -> Iterator[tuple[str, np.ndarray]]:
    """What can contradict the alignment: a clause that names the files, and whether each witness agrees."""
    for matrix, values, what in ((text, rows.caption, "a caption"), (image, rows.file, "an image's sha256")):
        first, second = _repeats(values)
        same = _cosine(matrix.rows(first), matrix.rows(second)) >= SAME_EMBEDDING
        yield f"{matrix.where}: where {metadata} repeats {what}, the embeddings differ", same
    known = np.flatnonzero(np.isfinite(rows.similarity))
    known = known[_spread(len(known))]
    close = np.abs(_cosine(image.rows(known), text.rows(known)) - rows.similarity[known]) <= SCORE_TOLERANCE
    yield f"{image.where}: cosines are not the similarities that {metadata} publishes", close


def _check(contradiction: str, agrees: np.ndarray) -> int:
    """The number of witnesses; an InputError where too many of them disagree."""
    if (wrong := int((~agrees).sum())) > MAX_DISAGREEMENT * len(agrees):
        raise InputError(f"{contradiction} ({wrong} of {len(agrees)}): rows are misaligned; fetch or make both again")
    return len(agrees)


def _repeats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with the same value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    same = same[_spread(len(same))]
    return order[same], order[same + 1]


def _spread(n: int) -> np.ndarray:
    """At most WITNESSES of n rows, evenly."""
    return np.unique(np.linspace(0, n - 1, min(n, WITNESSES)).astype(np.int64))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float32), b.astype(np.float32)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-12)

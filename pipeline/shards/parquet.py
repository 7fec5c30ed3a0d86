"""Parquet with an image column (bytes, or Hugging Face's struct{bytes, path}) and a caption column.

A row group that nobody touched is copied as bytes: pages, dictionaries, indexes and bloom filters; only the offsets in
the footer move. One that was touched is encoded anew as the source was (codec, dictionary and encoding per column, page
version, indexes; Hadoop's LZ4 becomes raw LZ4) and read back, and its other rows must have the digests they had. A
file that nobody touched is copied as a file.

Trade-off: one dropped row costs the encoding of its row group, twice its size in memory and at most 1 GiB of pages;
in return most bytes are only copied. The floor is three hashes (of the file read, of the images, of the file written)
and decoding, which the digest of a row needs.
"""

import hashlib
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any

from pipeline.errors import InputError
from pipeline.shards.footer import MAGIC, MAX_GROUP_BYTES, Footer, Moved
from pipeline.shards.manifest import Manifest
from pipeline.shards.reading import WINDOW, Mapping
from pipeline.shards.rows import Reader, decoder, slices
from pipeline.shards.sample import Counts, Sample, UidRule, check_unique
from pipeline.shards.store import Shard, join, view, whole


def samples(shard: Shard, uid: UidRule) -> Iterator[Sample]:
    reader = Reader(shard)
    seen: list[str] = []
    for group in range(len(reader.footer.groups)):
        for sample in reader.samples(group, uid):
            seen.append(sample.uid)
            yield sample
    check_unique(seen, shard.path)


def uids(shard: Shard, uid: UidRule) -> list[str]:
    reader = Reader(shard)
    batches = (b for group in range(len(reader.footer.groups)) for b in reader.slices(group, reader.layout.names))
    found = [name for batch in batches for _, name in reader.layout.identities(batch, uid)]
    check_unique(found, shard.path)
    return found


def manifest(shard: Shard, uid: UidRule) -> Manifest:
    reader, found = Reader(shard), Manifest()
    through = _Through(shard.path, reader.footer.view)
    for number, group in enumerate(reader.footer.groups):
        through.to(group.end)
        for batch in reader.slices(number):
            digests = reader.layout.digests(batch, reader.layout.images(batch))
            for (key, name), digest in zip(reader.layout.identities(batch, uid), digests, strict=True):
                found.add(name, key, digest)
    found.between = through.digest()
    return found


def intact(shard: Shard, known: Manifest) -> bool:
    """Whether the file is the one that the manifest was made of; for that its rows need not be decoded."""
    return _Through(shard.path, view(shard.path)).digest() == known.between


def rewrite(
    shard: Shard, out: str, edit: Callable[[Sample], Sample | None], uid: UidRule, dropped: str | None
) -> Counts:
    counts, before, started = Counts(output=shard.output), Manifest(), time.perf_counter()
    computing = writing = 0.0
    reader = Reader(shard)
    through = _Through(shard.path, reader.footer.view)
    with ExitStack() as files:
        kept = _Sink(files.enter_context(whole(join(out, shard.output))), reader)
        rest = _Sink(files.enter_context(whole(join(dropped, shard.output))), reader) if dropped else None
        for number, group in enumerate(reader.footer.groups):
            through.to(group.end)
            fates = _decide(reader, number, edit, uid)
            computing += fates.seconds
            counts.changed += fates.changed
            for name in fates.names:
                before.add(*name)
            tick = time.perf_counter()
            kept.add(number, fates, fates.keep, fates.edits)
            if rest:
                rest.add(number, fates, [not keep for keep in fates.keep], {})
            writing += time.perf_counter() - tick
        check_unique(before.uids, shard.path)
        before.between = through.digest()
        tick = time.perf_counter()
        for sink in (kept, rest) if rest else (kept,):
            sink.close()
    kept.manifest.save(out, shard.name)
    if rest and dropped:
        rest.manifest.save(dropped, shard.name)
        counts.dropped_sha256, counts.dropped_bytes = rest.manifest.sha256, rest.written
    writing += time.perf_counter() - tick
    counts.read, counts.out = len(before.uids), len(kept.manifest.uids)
    counts.dropped = counts.read - counts.out
    counts.input_sha256, counts.output_sha256, counts.output_bytes = before.sha256, kept.manifest.sha256, kept.written
    total = time.perf_counter() - started
    counts.seconds = {"read": total - computing - writing, "compute": computing, "write": writing}
    return counts


def concatenate(pieces: Sequence[tuple[Shard, int, int]], path: str, uid: UidRule) -> tuple[Manifest, int]:
    """Returns the manifest of the file at `path`, and its bytes."""
    with whole(path) as file:
        sink = _Sink(file, Reader(pieces[0][0]))
        for shard, first, n in pieces:
            reader, at = sink.turn_to(shard), 0
            for number, group in enumerate(reader.footer.groups):
                keep = [first <= row < first + n for row in range(at, at + group.rows)]
                if any(keep):
                    sink.add(number, _decide(reader, number, lambda sample: sample, uid), keep, {})
                at += group.rows
        sink.close()
    return sink.manifest, sink.written


_Edits = dict[int, dict[str, Any]]  # row -> column -> new value


@dataclass
class _Fates:
    """What becomes of the rows of a row group."""

    names: list[tuple[str, str, bytes]] = field(default_factory=list)  # uid, key, digests
    keep: list[bool] = field(default_factory=list)
    edits: _Edits = field(default_factory=dict)
    changed: int = 0
    seconds: float = 0.0


def _decide(reader: Reader, number: int, edit: Callable[[Sample], Sample | None], rule: UidRule) -> _Fates:
    fates, layout = _Fates(), reader.layout
    for batch in reader.slices(number):
        images = layout.images(batch)
        digests = layout.digests(batch, images)
        for sample, digest in zip(layout.samples(batch, images, rule), digests, strict=True):
            tick = time.perf_counter()
            after = edit(sample)
            fates.seconds += time.perf_counter() - tick
            if after is not None and after is not sample:
                fates.changed += 1
                new = {k: bytes(v) for k, v in after.parts.items() if v is not sample.parts[k]}
                columns = {layout.caption if k == "txt" else layout.image: value for k, value in new.items()}
                if columns:
                    said = after.row.maps[0] if isinstance(after.row, ChainMap) else {}
                    fates.edits[len(fates.keep)] = {**said, **columns}
            fates.keep.append(after is not None)
            fates.names.append((sample.uid, sample.key, digest))
    return fates


class _Sink:
    """A parquet file in the making, with the columns of the shard that it begins with.

    Row groups to be copied wait for the first that is not the source's, or the end: if then they are all, the file is
    copied as it is, with what lies between them.
    """

    def __init__(self, file: IO[bytes], reader: Reader):
        self.file, self.reader, self.first = file, reader, reader
        self.manifest, self.written = Manifest(), 0
        self._sha256 = hashlib.sha256()
        self._waiting: list[int] = []
        self._moved: list[Moved] = []

    def turn_to(self, shard: Shard) -> Reader:
        """What is added from here on is of this shard. Raises InputError where its columns are others."""
        if shard != self.reader.shard:
            self._flush()
            self.reader = Reader(shard)
            if not self.reader.layout.like(self.first.layout) or self._stored(self.reader) != self._stored(self.first):
                raise InputError(f"{shard.path}: its columns are not those of {self.first.shard.path}")
        return self.reader

    @staticmethod
    def _stored(reader: Reader) -> list[tuple[object, ...]]:
        return [(leaf.path, *leaf.stored) for leaf in reader.footer.leaves]

    def add(self, number: int, fates: _Fates, keep: list[bool], edits: _Edits) -> None:
        """The rows of a row group that are to be kept; none leave no row group."""
        names = [name for name, there in zip(fates.names, keep, strict=True) if there]
        if all(keep) and not edits:
            self._waiting.append(number)
            if self._moved:
                self._flush()
        elif names:
            encoded = _encoded(self.reader, number, keep, edits)
            # rows that changed, or that others went before, may not be in order any more
            like = number if not edits and self.reader is self.first else None
            moved = self.first.footer.moved(encoded, 0, encoded.groups[0].chunks[0].start, like)
            digests = _digests(self.first, encoded, moved)
            where = f"{self.reader.shard.path}: row group {number}"
            _check_equal(where, fates, keep, edits, digests, self.reader.layout.image)
            names = [(uid, key, digest) for (uid, key, _), digest in zip(names, digests, strict=True)]
            self._flush()
            self._append(encoded, 0, like)
        for name in names:
            self.manifest.add(*name)

    def close(self) -> None:
        source = self.reader.footer
        if not self._moved and len(self._waiting) == len(source.groups):
            for at in range(0, len(source.view), WINDOW):
                source.reach(at, at + WINDOW)
                self._write(source.view[at : at + WINDOW])
        else:
            self._flush()
            for moved in self._moved:
                for content in moved.place(self.written):
                    self._write(content)
            if not self.written:
                self._write(MAGIC)
            self._write(self.first.footer.tail([moved.struct for moved in self._moved]))
        self.manifest.between = self._sha256.digest()

    def _flush(self) -> None:
        for number in self._waiting:
            if self.reader.footer.groups[number].rows:  # writers put anything into the offsets of an empty one
                self._append(self.reader.footer, number, None)
        self._waiting = []

    def _append(self, source: Footer, number: int, like: int | None) -> None:
        if not self.written:
            self._write(MAGIC)
        moved = self.first.footer.moved(source, number, self.written, like)
        for start, end in moved.pieces:
            for at in range(start, end, WINDOW):
                source.reach(at, min(at + WINDOW, end))
                self._write(source.view[at : min(at + WINDOW, end)])
        self._moved.append(moved._replace(pieces=[]))

    def _write(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self.file.write(data)
        self.written += len(data)


def _encoded(reader: Reader, number: int, keep: list[bool], edits: _Edits) -> Footer:
    """A file in memory whose one row group has the rows to keep. Raises InputError where they cannot be written so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where, at, held, tables = f"{reader.shard.path}: row group {number}", 0, 0, []
    for batch in reader.slices(number):
        rows = range(at, at + len(batch))
        table = reader.layout.edited(batch, {row - at: edits[row] for row in rows if row in edits})
        tables.append(table.filter(pa.array(keep[at : rows.stop], pa.bool_())).combine_chunks())
        at, held = rows.stop, held + tables[-1].nbytes
        if held > MAX_GROUP_BYTES:
            raise InputError(f"{where} has more than {MAX_GROUP_BYTES} bytes to encode; write smaller row groups first")
    table, out = pa.concat_tables(tables), pa.BufferOutputStream()
    try:
        options = reader.footer.writing(number, _leaf_names(reader.shard.path, table.schema))
        pq.write_table(table, out, row_group_size=len(table), store_schema=False, **options)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{where} cannot be encoded as it came ({error}); write the shard with pyarrow first"
        ) from error
    encoded = Footer(reader.shard.path, memoryview(out.getvalue()))
    if [leaf.stored for leaf in encoded.leaves] != [leaf.stored for leaf in reader.footer.leaves]:
        raise InputError(f"{where} has columns that pyarrow stores in another way; write the shard with pyarrow first")
    return encoded


def _leaf_names(path: str, schema: Any) -> list[str]:
    """The leaves as pyarrow's writer will call them, which differs in lists of other writers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), out)
    return [b".".join(leaf.path).decode() for leaf in Footer(path, memoryview(out.getvalue())).leaves]


def _digests(reader: Reader, encoded: Footer, moved: Moved) -> list[bytes]:
    """Those of the rows as readers of the output will see them: new pages under the old schema."""
    layout = reader.layout
    batches = slices(encoded, decoder(reader.footer, encoded, [moved.struct]), 0)
    return [digest for batch in batches for digest in layout.digests(batch, layout.images(batch))]


def _check_equal(
    where: str,
    fates: _Fates,
    keep: list[bool],
    edits: _Edits,
    digests: list[bytes],
    image: str,
) -> None:
    """Raises InputError unless what was not edited has the digest it had."""
    after = iter(digests)
    for row, (_, key, before) in enumerate(fates.names):
        if keep[row]:
            new, found = edits.get(row, {}), next(after)
            expected = hashlib.sha256(new[image]).digest() if image in new else before[:32]
            if found[:32] != expected or (new.keys() <= {image} and found[32:] != before[32:]):
                what = f"{where}: the row {key!r} is not the same when it is encoded again"
                raise InputError(f"{what}; write the shard with pyarrow first")


class _Through:
    """The sha256 of a file, taken as far as its rows are being read, so that both find the bytes in the cache."""

    def __init__(self, path: str, view: memoryview):
        self._file, self._sha256, self._at = Mapping(path, view), hashlib.sha256(), 0

    def to(self, end: int) -> None:
        while self._at < end:
            stop = min(self._at + WINDOW, end)
            self._file.reach(stop, self._at)
            self._sha256.update(self._file.view[self._at : stop])
            self._at = stop

    def digest(self) -> bytes:
        self.to(self._file.size)
        return self._sha256.digest()

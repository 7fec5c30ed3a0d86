"""The rows of a parquet file, a few at a time, as samples and as digests.

Trade-off: slices are sized by what the page headers say they can become, not by a row count. So a value of 10 MB that
a dictionary repeats 100,000 times costs one slice of memory; honest files pay for a walk over their page headers.

Only the stored types count: ARROW:schema is never read, and a path in a row is never opened.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import InputError
from pipeline.shards import canonical
from pipeline.shards.footer import MAGIC, MAX_GROUP_BYTES, Footer
from pipeline.shards.sample import IMAGE_SUFFIXES, Bytes, Rejected, Sample, UidRule, uid_of
from pipeline.shards.store import Shard, view
from pipeline.shards.thrift import Struct
from pipeline.tables import CAPTION, IMAGE, KEY, UID, column

MAX_EXPANSION = 32  # bytes decoded from a byte of pages, in row groups that become larger than MAX_GROUP_BYTES
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
_EMPTY = hashlib.sha256().digest()


class Reader:
    """An opened shard: `footer`, `layout`, and its row groups in slices."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self.footer = Footer(shard.path, view(shard.path))
        self._file = decoder(self.footer, self.footer, [group.struct for group in self.footer.groups])
        self.layout = Layout(shard, self._file.schema_arrow)

    def slices(self, group: int, columns: list[str] | None = None) -> Iterator[Any]:
        """Record batches of a row group."""
        for chunk in self.footer.groups[group].chunks:
            self.footer.reach(chunk.start, chunk.end)
        return slices(self.footer, self._file, group, columns) if self.footer.groups[group].rows else iter(())

    def samples(self, group: int, rule: UidRule) -> Iterator[Sample]:
        for batch in self.slices(group):
            yield from self.layout.samples(batch, self.layout.images(batch), rule)


def decoder(schema: Footer, pages: Footer, groups: list[Struct]) -> Any:
    """A pyarrow ParquetFile of `groups` that lie in the file of `pages`, with the columns of `schema`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + schema.tail(groups, facts=False)))
        return pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(pages.view)),
            metadata=metadata,
            pre_buffer=False,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{schema.path}: not a readable parquet file ({error}); fetch the shard again") from error


def slices(pages: Footer, file: Any, group: int, columns: list[str] | None = None) -> Iterator[Any]:
    """Record batches of a row group, bounded in bytes. Raises InputError where it is damaged or unpacks without end."""
    import pyarrow as pa

    where = f"{pages.path}: row group {group}"
    size, total = pages.slicing(group)
    most = max(MAX_GROUP_BYTES, MAX_EXPANSION * total)
    rows = decoded = 0
    try:
        for batch in file.iter_batches(size, [group], columns, use_threads=False):
            rows, decoded = rows + batch.num_rows, decoded + batch.nbytes
            if decoded > most:
                raise InputError(f"{where} unpacks to more than {most} bytes; refused")
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} is damaged ({error}); fetch the shard again") from error
    if rows != pages.groups[group].rows:
        raise InputError(
            f"{where} has {rows} rows, not the {pages.groups[group].rows} it states; fetch the shard again"
        )


class Layout:
    """Which columns of a file hold what, by name (tables.py) and stored type.

    A file needs a uid or a key. A uid made of the content would clash where rows repeat, and would change with the
    poison that it has to point at; one made of the position would change with every row dropped. So without either a
    shard is refused, and the message says how to add a key.
    """

    def __init__(self, shard: Shard, schema: Any):
        self.shard, names = shard, schema.names
        have = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if len(set(names)) < len(names):
            raise InputError(f"{shard.path}: two columns share a name among: {have}")
        self.image = next((n for n in IMAGE if n in names and _image_type(schema.field(n).type)), "")
        self.caption = next((n for n in CAPTION if n in names and _is_text(schema.field(n).type)), "")
        self.uid, self.key = column(names, UID), column(names, KEY)
        if not self.image:
            found = column(names, IMAGE)
            why = f"column {found!r} holds {schema.field(found).type}, not image bytes" if found else "no image column"
            raise InputError(f"{shard.path}: {why} ({' | '.join(IMAGE)}) among: {have}")
        if not self.caption:
            found = column(names, CAPTION)
            why = f"column {found!r} holds {schema.field(found).type}, not text" if found else "no caption column"
            raise InputError(f"{shard.path}: {why} ({' | '.join(CAPTION)}) among: {have}")
        if self.key is None and self.uid is None:
            remedy = 'add one, e.g. dataset.add_column("id", [str(i) for i in range(len(dataset))]), and write it again'
            raise InputError(
                f"{shard.path}: neither a uid nor a key column ({' | '.join(KEY)}) among: {have}; {remedy}"
            )
        self._name = str(self.key or self.uid)
        self._others = [name for name in names if name not in (self.image, self.caption)]
        self._head = hashlib.sha256(canonical.schema(schema))

    def like(self, other: "Layout") -> bool:
        """Whether rows of both have the same columns, of the same types and uses."""
        return self._head.digest() == other._head.digest()

    @property
    def names(self) -> list[str]:
        """The columns that a uid takes."""
        return [name for name in (self.uid, self.key) if name]

    def identities(self, batch: Any, rule: UidRule) -> list[tuple[str, str]]:
        """Key and uid of every row."""
        published = _texts(batch.column(self.uid)) if self.uid else [None] * len(batch)
        found = []
        for name, uid in zip(_texts(batch.column(self._name)), published, strict=True):
            if name is None:
                raise InputError(f"{self.shard.path}: column {self._name!r} has nulls or text that is not UTF-8")
            found.append((name, uid_of(name, self.shard.name, uid, rule)))
        return found

    def images(self, batch: Any) -> list[memoryview | None]:
        """The images as views into the batch; None for null, also where there is a path."""
        import numpy as np

        array = self._image_bytes(batch.column(self.image))
        data = memoryview(array.buffers()[2] or b"")
        at = np.frombuffer(array.buffers()[1] or bytes(8), np.int32)[array.offset :].tolist()
        return [data[at[i] : at[i + 1]] if there else None for i, there in enumerate(array.is_valid().to_pylist())]

    def samples(self, batch: Any, images: list[memoryview | None], rule: UidRule) -> Iterator[Sample]:
        import pyarrow as pa

        captions = batch.column(self.caption).cast(pa.binary()).to_pylist()
        for row, (key, uid) in enumerate(self.identities(batch, rule)):
            image = images[row]
            parts: dict[str, Bytes] = {} if image is None else {self._suffix(image): image}
            parts["txt"] = captions[row] or b""
            yield Sample(key, uid, parts, Row(batch, row, self._others))

    def digests(self, batch: Any, images: list[memoryview | None]) -> list[bytes]:
        """sha256 of the image, then of the row without it: of `canonical.schema` of the file, and the row's run.

        There the image's bytes stand as a boolean: whether they are there. Without them, the sha256 is that of nothing.
        """
        import pyarrow as pa

        fields = [self._without(array) if n == self.image else array for n, array in self._columns(batch)]
        row = canonical.runs(pa.StructArray.from_arrays(fields, names=batch.schema.names))
        found = []
        for i, image in enumerate(images):
            rest = self._head.copy()
            rest.update(row(i, i + 1))
            found.append((_EMPTY if image is None else hashlib.sha256(image).digest()) + rest.digest())
        return found

    def edited(self, batch: Any, edits: Mapping[int, Mapping[str, Any]]) -> Any:
        """The batch as a table, with some columns of some rows replaced: the image, texts."""
        import pyarrow as pa

        table = pa.Table.from_batches([batch])
        for name in sorted({name for new in edits.values() for name in new}):
            array, field, pieces, at = batch.column(name), batch.schema.field(name), [], 0
            for row, new in sorted(edits.items()):
                if name in new:
                    value = new[name]
                    value = {**array[row].as_py(), "bytes": value} if pa.types.is_struct(field.type) else value
                    value = value.decode() if pa.types.is_string(field.type) and isinstance(value, bytes) else value
                    pieces += [array.slice(at, row - at), pa.array([value], field.type)]
                    at = row + 1
            column = pa.chunked_array([*pieces, array.slice(at)], field.type)
            table = table.set_column(table.schema.get_field_index(name), field, column)
        return table

    def _columns(self, batch: Any) -> Iterator[tuple[str, Any]]:
        return zip(batch.schema.names, batch.columns, strict=True)

    def _image_bytes(self, array: Any) -> Any:
        import pyarrow as pa

        if not pa.types.is_struct(array.type):
            return array
        return array.flatten()[array.type.get_field_index("bytes")]

    def _without(self, array: Any) -> Any:
        import pyarrow as pa

        present = self._image_bytes(array).is_valid()
        if not pa.types.is_struct(array.type):
            return present
        names = [field.name for field in array.type]
        fields = [present if n == "bytes" else part for n, part in zip(names, array.flatten(), strict=True)]
        return pa.StructArray.from_arrays(fields, names=names, mask=array.is_null())

    def _suffix(self, data: memoryview) -> str:
        if self.image in IMAGE_SUFFIXES:
            return self.image
        head = bytes(data[:4])
        return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), "jpg")


class Row(Mapping[str, Any]):
    """The other columns of a row, turned into Python when asked for."""

    def __init__(self, batch: Any, row: int, names: list[str]):
        self._batch, self._row, self._names = batch, row, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._batch.column(name)[self._row].as_py()
        except UnicodeDecodeError as error:
            raise Rejected(f"column {name!r} is not UTF-8") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _image_type(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _texts(array: Any) -> list[str | None]:
    """The values as text; None for null and what is not UTF-8."""
    try:
        values = array.to_pylist()
        return [v.decode() if isinstance(v, bytes) else None if v is None else str(v) for v in values]
    except UnicodeDecodeError:
        return [None] * len(array)

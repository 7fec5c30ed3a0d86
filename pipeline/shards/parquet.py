"""Parquet with an image column (bytes, or Hugging Face's struct{bytes, path}) and a caption column.

Row groups are read one at a time, so memory is bounded by a row group. A shard nobody touched is copied as a file; in
one that was touched, every other value stays equal and the row groups keep their borders.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import InputError
from pipeline.shards.sample import IMAGE_SUFFIXES, Counts, Sample, UidRule, check_unique, uid_of
from pipeline.shards.store import Shard, join, view, whole
from pipeline.tables import CAPTION, IMAGE, KEY, UID, column

_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


class _Layout:
    """Which columns of this file hold what."""

    def __init__(self, shard: Shard, schema: Any):
        import pyarrow as pa

        names = schema.names
        self.image, self.caption = column(names, IMAGE), column(names, CAPTION)
        self.uid, self.key = column(names, UID), column(names, KEY)
        have = ", ".join(names)
        if self.image is None:
            raise InputError(f"{shard.path}: no image column ({' | '.join(IMAGE)}) among: {have}")
        if self.caption is None:
            raise InputError(f"{shard.path}: no caption column ({' | '.join(CAPTION)}) among: {have}")
        if self.key is None and self.uid is None:
            raise InputError(f"{shard.path}: neither a uid nor a key column ({' | '.join(KEY)}) among: {have}")
        kind = schema.field(self.image).type
        self.struct = pa.types.is_struct(kind)
        inner = kind.field("bytes").type if self.struct and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise InputError(f"{shard.path}: column {self.image!r} holds {kind}, not image bytes")
        self.scalars = [n for n in names if n not in (self.image, self.caption)]

    def samples(self, shard: Shard, table: Any, rule: UidRule) -> Iterator[Sample]:
        rows = table.select(self.scalars).to_pylist() if self.scalars else [{}] * table.num_rows
        images, captions = table.column(self.image), table.column(self.caption)
        for row, image, caption in zip(rows, images, captions, strict=True):
            data = (image["bytes"] if self.struct and image.is_valid else image).as_py() or b""
            text = caption.as_py()
            parts = {self._suffix(data): data, "txt": str(text).encode() if text is not None else b""}
            yield Sample(self._key(row), self.uid_of(shard, row, rule), parts, row)

    def uid_of(self, shard: Shard, row: dict[str, Any], rule: UidRule) -> str:
        return uid_of(self._key(row), shard.name, row.get(str(self.uid)), rule)

    def _key(self, row: dict[str, Any]) -> str:
        return str(row[str(self.key or self.uid)])

    def _suffix(self, data: bytes) -> str:
        if self.image in IMAGE_SUFFIXES:
            return str(self.image)
        return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "jpg")

    def changed(self, table: Any, edits: dict[int, Sample]) -> Any:
        """The table with the image and caption of some rows replaced."""
        import pyarrow as pa

        for name in (self.image, self.caption) if edits else ():
            field = table.schema.field(name)
            values = table.column(name).to_pylist()
            for row, sample in edits.items():
                if name == self.caption:
                    values[row] = bytes(sample.parts["txt"]).decode()
                elif self.struct:
                    values[row] = {**values[row], "bytes": sample.image}
                else:
                    values[row] = sample.image
            table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        return table


def samples(shard: Shard, uid: UidRule) -> Iterator[Sample]:
    file = _open(shard)
    layout = _Layout(shard, file.schema_arrow)
    seen: list[str] = []
    for group in range(file.num_row_groups):
        for sample in layout.samples(shard, file.read_row_group(group), uid):
            seen.append(sample.uid)
            yield sample
    check_unique(seen, shard.path)


def uids(shard: Shard, uid: UidRule) -> list[str]:
    file = _open(shard)
    layout = _Layout(shard, file.schema_arrow)
    table = file.read(columns=[c for c in (layout.uid, layout.key) if c])
    found = [layout.uid_of(shard, row, uid) for row in table.to_pylist()]
    check_unique(found, shard.path)
    return found


def rewrite(shard: Shard, out: str, edit: Callable[[Sample], Sample | None], uid: UidRule) -> Counts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = Counts(output=shard.file)
    clock = time.perf_counter()
    buffer = view(shard.path)
    counts.input_sha256 = hashlib.sha256(buffer).hexdigest()
    file = _open(shard)
    layout = _Layout(shard, file.schema_arrow)
    keep: list[list[bool]] = []
    edits: list[dict[int, Sample]] = []
    seen: list[str] = []
    spent_editing = 0.0
    for group in range(file.num_row_groups):
        keep.append([])
        edits.append({})
        for row, sample in enumerate(layout.samples(shard, file.read_row_group(group), uid)):
            seen.append(sample.uid)
            tick = time.perf_counter()
            after = edit(sample)
            spent_editing += time.perf_counter() - tick
            keep[-1].append(after is not None)
            if after is not None and after is not sample:
                edits[-1][row] = after
    check_unique(seen, shard.path)
    counts.read = len(seen)
    counts.out = sum(map(sum, keep))
    counts.dropped, counts.changed = counts.read - counts.out, sum(map(len, edits))
    counts.seconds["read"] = time.perf_counter() - clock - spent_editing
    counts.seconds["compute"] = spent_editing
    clock = time.perf_counter()
    with whole(join(out, shard.file)) as target:
        sink = _Hashing(target)
        if not counts.dropped and not counts.changed:
            sink.write(buffer)
        else:
            codec = file.metadata.row_group(0).column(0).compression if file.num_row_groups else "SNAPPY"
            with pq.ParquetWriter(pa.PythonFile(sink, "w"), file.schema_arrow, compression=codec) as writer:
                for group in range(file.num_row_groups):
                    table = layout.changed(file.read_row_group(group), edits[group])
                    writer.write_table(table.filter(pa.array(keep[group], pa.bool_())))
    counts.output_sha256, counts.output_bytes = sink.sha256.hexdigest(), sink.written
    counts.seconds["write"] = time.perf_counter() - clock
    return counts


class _Hashing:
    """What pyarrow needs of a file, hashing on the way."""

    closed = False

    def __init__(self, file: Any):
        self.file, self.sha256, self.written = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.written += len(data)
        return len(data)

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        pass


def _open(shard: Shard) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(pa.BufferReader(pa.py_buffer(view(shard.path))))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{shard.path}: not a readable parquet file ({error}); fetch the shard again") from error

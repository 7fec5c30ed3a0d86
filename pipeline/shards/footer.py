"""The footer of a parquet file: checked before anybody believes it, and written anew around row groups that moved.

Trade-off: pyarrow reads and writes values but cannot copy a row group, so the metadata is handled here, down to the
headers of the pages and no further. That also tells what decoding will cost before pyarrow allocates it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.shards.pages import CODEC, CODECS, MAX_SLICE_BYTES, VALUES, Chunk, Leaf, Pages, walk
from pipeline.shards.reading import WINDOW, Mapping
from pipeline.shards.thrift import (
    BINARY,
    I32,
    I64,
    LIST,
    MAX_DEPTH,
    STRUCT,
    Buffer,
    Struct,
    get,
    items,
    read_struct,
    written,
)

MAX_FOOTER_BYTES = 64 * 1024**2
MAX_ROWS = 2_000_000
MAX_GROUP_BYTES = 1024**3  # of the pages in memory at a time, and of a row group that is encoded anew
SLICE_BYTES, SLICE_ROWS = 2 * 1024**2, 1024  # what they usually are
MAGIC = b"PAR1"

# Field ids of parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData
_SCHEMA, _ROWS, _GROUPS, _FACTS, _ENCRYPTION = 2, 3, 4, 5, 8
_CHUNKS, _GROUP_ROWS, _SORTING, _GROUP_OFFSET, _ORDINAL = 1, 3, 4, 5, 7
_FILE, _CHUNK_OFFSET, _META, _OFFSET_INDEX, _COLUMN_INDEX, _CRYPTO, _ENCRYPTED = 1, 2, 3, 4, 6, 8, 9
_TYPE, _PATH, _SIZE, _DATA, _INDEX_PAGE, _DICTIONARY, _STATISTICS, _BLOOM = 1, 3, 7, 9, 10, 11, 12, 14
_INT32, _INT64, _INT96, _FIXED = 1, 2, 3, 7
_DECIMAL = 5  # of ConvertedType
# Encodings that a writer must have been asked for; the others follow from type, page version and dictionary.
_ENCODINGS = {5: "DELTA_BINARY_PACKED", 6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 9: "BYTE_STREAM_SPLIT"}


class Group(NamedTuple):
    struct: Struct
    rows: int
    chunks: list[Chunk]

    @property
    def end(self) -> int:
        return max((chunk.end for chunk in self.chunks), default=0)


class Footer:
    """The metadata of the parquet file in `view`. Raises InputError, naming `path`, where it cannot be trusted."""

    def __init__(self, path: str, view: memoryview):
        self.path, self.view, self._file = path, view.cast("B"), Mapping(path, view)
        try:
            self._meta, end = self._read()
            self.leaves = _leaves(items(self._meta, _SCHEMA, STRUCT))
            self.groups = [self._group(group) for group in items(self._meta, _GROUPS, STRUCT)]
            rows = sum(group.rows for group in self.groups)
            if rows != get(self._meta, _ROWS, I64) or rows > MAX_ROWS:
                raise ValueError(f"{rows} rows in its row groups, more than it states or than {MAX_ROWS}")
            self._check_ranges(end)
        except ValueError as error:
            raise InputError(f"{path}: broken parquet footer ({error}); fetch the shard again") from error

    def _read(self) -> tuple[Struct, int]:
        size = len(self.view)
        tail = bytes(self.view[max(0, size - 8) :])
        if size < 12 or bytes(self.view[:4]) != MAGIC or tail[4:] not in (MAGIC, b"PARE"):
            raise ValueError("it does not begin and end as parquet does")
        if tail[4:] == b"PARE":
            raise InputError(f"{self.path}: is encrypted; decrypt it first")
        length = int.from_bytes(tail[:4], "little")
        if length > min(size - 12, MAX_FOOTER_BYTES):
            raise ValueError(f"it states {length} bytes, more than the file or {MAX_FOOTER_BYTES}")
        start = size - 8 - length
        self.reach(start, size)
        meta, end = read_struct(self.view, start, size - 8)
        if _ENCRYPTION in meta:
            raise InputError(f"{self.path}: is encrypted; decrypt it first")
        if end != size - 8:
            raise ValueError("there is data behind it")
        return meta, start

    def reach(self, start: int, end: int) -> None:
        """Make these bytes safe to touch."""
        for at in range(start, end, WINDOW):
            self._file.reach(min(at + WINDOW, end), at)

    def _group(self, struct: Struct) -> Group:
        rows, chunks = get(struct, _GROUP_ROWS, I64), items(struct, _CHUNKS, STRUCT)
        if rows < 0 or len(chunks) != len(self.leaves):
            raise ValueError(f"a row group of {rows} rows and {len(chunks)} columns, of {len(self.leaves)}")
        return Group(struct, rows, [self._chunk(*pair, rows) for pair in zip(chunks, self.leaves, strict=True)])

    def _chunk(self, struct: Struct, leaf: Leaf, rows: int) -> Chunk:
        if _FILE in struct:
            raise InputError(f"{self.path}: its columns lie in other files; write it as one file")
        if _CRYPTO in struct or _ENCRYPTED in struct:
            raise InputError(f"{self.path}: has encrypted columns; decrypt it first")
        meta = get(struct, _META, STRUCT)
        values, size = get(meta, VALUES, I64), get(meta, _SIZE, I64)
        start, dictionary = get(meta, _DATA, I64), get(meta, _DICTIONARY, I64, 0)
        if get(meta, _TYPE, I32) != leaf.stored[0] or values < 0 or size < 0 or (values != rows and not leaf.repeated):
            raise ValueError(f"column {leaf.name} is not what the schema says")
        start = dictionary if 0 < dictionary < start else start  # some writers state 0 where there is none
        if rows and max(dictionary, meta[_DATA][1]) > start + size:
            raise ValueError(f"the pages of column {leaf.name} begin behind their end")
        return Chunk(leaf, struct, meta, start, start + size if rows else start)  # without rows, any offset is seen

    def _check_ranges(self, end: int) -> None:
        """Nothing outside the file, nothing counted twice: so copies are no larger than the file."""
        ranges = [(chunk.start, chunk.end) for group in self.groups for chunk in group.chunks]
        ranges += [found[2:] for group in self.groups for chunk in group.chunks for found in _beside(chunk)]
        position = len(MAGIC)
        for start, stop in sorted(ranges):
            if start < stop:
                if start < position or stop > end:
                    raise ValueError(f"bytes {start} to {stop} overlap others or lie outside the file")
                position = stop

    def pages(self, number: int) -> list[Pages]:
        """Of every column of a row group. Raises InputError where they are not what the footer says."""
        try:
            return [walk(self.view, chunk) for chunk in self.groups[number].chunks]
        except ValueError as error:
            raise InputError(f"{self.path}: row group {number} is broken ({error}); fetch the shard again") from error

    def slicing(self, number: int) -> tuple[int, int]:
        """How many rows of a row group may be decoded together, and the bytes of all its pages.

        Raises InputError where not even one row may be decoded.
        """
        group, pages = self.groups[number], self.pages(number)
        row = sum(page.longest for page, chunk in zip(pages, group.chunks, strict=True) if not chunk.leaf.repeated)
        lists = sum(
            get(chunk.meta, VALUES, I64) * max(8, page.longest)
            for page, chunk in zip(pages, group.chunks, strict=True)
            if chunk.leaf.repeated
        )
        held = sum(page.largest + (page.dictionary or 0) for page in pages)
        if max(held, lists) > MAX_GROUP_BYTES or row > MAX_SLICE_BYTES:
            what = f"a page, a list or a value of row group {number} may take {max(held, lists, row)} bytes in memory"
            raise InputError(f"{self.path}: {what}; refused, write smaller row groups")
        total = sum(page.total for page in pages)
        usual = SLICE_BYTES * group.rows // max(1, total)
        return max(1, min(SLICE_ROWS, usual, MAX_SLICE_BYTES // max(1, row))), total

    def writing(self, number: int, names: list[str]) -> dict[str, Any]:
        """Options of pyarrow's writer that encode as this row group is encoded; `names` are the leaves' there."""
        chunks = list(zip(names, self.groups[number].chunks, strict=True))
        pages = dict(zip(names, self.pages(number), strict=True))
        codecs = {name: CODECS.get(get(chunk.meta, CODEC, I32)) for name, chunk in chunks}
        if None in codecs.values():
            raise InputError(f"{self.path}: row group {number} has a codec that cannot be written; write it with zstd")
        asked = {name: _ENCODINGS[e] for name, page in pages.items() for e in page.encodings if e in _ENCODINGS}
        return {
            "compression": codecs,
            "use_dictionary": [name for name, page in pages.items() if page.dictionary is not None],
            "column_encoding": {name: e for name, e in asked.items() if pages[name].dictionary is None} or None,
            "write_statistics": [name for name, chunk in chunks if _STATISTICS in chunk.meta],
            "bloom_filter_options": {name: True for name, chunk in chunks if _BLOOM in chunk.meta} or None,
            "write_page_index": any(_COLUMN_INDEX in chunk.struct for _, chunk in chunks),
            "write_page_checksum": any(page.checksums for page in pages.values()),
            "data_page_version": "2.0" if any(page.second_version for page in pages.values()) else "1.0",
            "data_page_size": max(1, min(1024**2, max((page.largest for page in pages.values()), default=1))),
            "use_deprecated_int96_timestamps": any(leaf.stored[0] == _INT96 for leaf in self.leaves),
            "store_decimal_as_integer": any(leaf.decimal for leaf in self.leaves),
        }

    def moved(self, source: "Footer", number: int, at: int, like: int | None = None) -> "Moved":
        """A row group of `source` (this file, or one with the same leaves) as it is when its pages begin at `at`.

        `like` is the row group of this file that it replaces: one that was filtered is sorted as that was.
        """
        try:
            return self._moved(source, source.groups[number], at, like)
        except ValueError as error:
            where = f"{self.path}: row group {number}"
            raise InputError(f"{where} has a broken index ({error}); fetch the shard again") from error

    def _moved(self, source: "Footer", group: Group, at: int, like: int | None) -> "Moved":
        begin, columns, pieces, beside = at, [], [], []
        for leaf, chunk in zip(self.leaves, group.chunks, strict=True):
            shift = at - chunk.start
            meta = {k: v for k, v in chunk.meta.items() if k not in (_INDEX_PAGE, _BLOOM, _BLOOM + 1)}
            meta |= {_PATH: (LIST, (BINARY, list(leaf.path))), _DATA: (I64, meta[_DATA][1] + shift)}
            if get(meta, _DICTIONARY, I64, 0) > 0:
                meta[_DICTIONARY] = (I64, meta[_DICTIONARY][1] + shift)
            begins = chunk.struct.get(_CHUNK_OFFSET) == (I64, chunk.start)  # else a copy of the metadata, left behind
            column = {k: v for k, v in chunk.struct.items() if k < _OFFSET_INDEX or k > _COLUMN_INDEX + 1}
            column |= {_CHUNK_OFFSET: (I64, at if begins else 0), _META: (STRUCT, meta)}
            columns.append(column)
            pieces.append((chunk.start, chunk.end))
            for in_meta, field, start, end in _beside(chunk):
                source.reach(start, end)
                content: Buffer = source.view[start:end]
                if field == _OFFSET_INDEX:
                    content = _shifted(content, chunk, shift)
                beside.append((meta if in_meta else column, field, content if source is self else bytes(content)))
            at += chunk.end - chunk.start
        struct = {**group.struct, _CHUNKS: (LIST, (STRUCT, columns))}
        struct.pop(_ORDINAL, None)
        if _GROUP_OFFSET in struct:
            struct[_GROUP_OFFSET] = (I64, begin)
        if like is not None and _SORTING in self.groups[like].struct:
            struct[_SORTING] = self.groups[like].struct[_SORTING]
        return Moved(struct, pieces, beside)

    def tail(self, groups: list[Struct], facts: bool = True) -> bytes:
        """What ends a file with these row groups: this footer around them, its length, the magic.

        Without `facts` it has no key-value metadata: pyarrow then gives the stored types, whatever ARROW:schema says.
        """
        rows = sum(get(group, _GROUP_ROWS, I64) for group in groups)
        meta = {**self._meta, _ROWS: (I64, rows), _GROUPS: (LIST, (STRUCT, groups))}
        if not facts:
            meta.pop(_FACTS, None)
        data = written(meta)
        return data + len(data).to_bytes(4, "little") + MAGIC


class Moved(NamedTuple):
    """A row group's metadata at its new place, the ranges of its pages in the old, and what lies apart from them."""

    struct: Struct
    pieces: list[tuple[int, int]]
    beside: list[tuple[Struct, int, Buffer]]  # whose field says where it lies, that field, the bytes

    def place(self, at: int) -> Iterator[Buffer]:
        """The indexes and bloom filters, which the metadata says begin at `at`."""
        for owner, field, content in self.beside:
            owner[field], owner[field + 1] = (I64, at), (I32, len(content))
            at += len(content)
            yield content


def _leaves(schema: list[Struct]) -> list[Leaf]:
    if not schema:
        raise ValueError("no schema")
    leaves: list[Leaf] = []
    open_groups: list[tuple[list[int], tuple[bytes, ...], tuple[int, ...]]] = [([get(schema[0], 5, I32, 0)], (), ())]
    for element in schema[1:]:
        while open_groups and not open_groups[-1][0][0]:
            open_groups.pop()
        if not open_groups or len(open_groups) > MAX_DEPTH:
            raise ValueError(f"a schema that does not add up, or of more than {MAX_DEPTH} levels")
        left, path, levels = open_groups[-1]
        left[0] -= 1
        step = get(element, 3, I32)
        name = get(element, 4, BINARY)
        name.decode()  # raises ValueError where it is not UTF-8
        path, levels = (*path, name), (*levels, step) if step else levels
        if 1 not in element:
            open_groups.append(([get(element, 5, I32)], path, levels))
            continue
        kind, decimal = get(element, 1, I32), element.get(6) == (I32, _DECIMAL)
        length = get(element, 2, I32) if kind == _FIXED else 0
        if length < 0:
            raise ValueError("a value of negative length")
        leaves.append(Leaf(path, (kind, length, levels), decimal and kind in (_INT32, _INT64)))
    if any(left[0] for left, *_ in open_groups):
        raise ValueError("a schema that does not add up")
    return leaves


def _beside(chunk: Chunk) -> Iterator[tuple[bool, int, int, int]]:
    """What lies apart from the pages: whether ColumnMetaData names it, in which field, start, end.

    A bloom filter of unstated length (old writers) is not found: it is left behind in a copy.
    """
    for in_meta, field in ((False, _COLUMN_INDEX), (False, _OFFSET_INDEX), (True, _BLOOM)):
        owner = chunk.meta if in_meta else chunk.struct
        if field in owner and field + 1 in owner:
            start, size = get(owner, field, I64), get(owner, field + 1, I32)
            if size < 0:
                raise ValueError("an index of negative length")
            yield in_meta, field, start, start + size


def _shifted(index: Buffer, chunk: Chunk, by: int) -> bytes:
    """An offset index whose pages have moved."""
    struct, _ = read_struct(index, 0, len(index))
    for location in items(struct, 1, STRUCT):
        start = get(location, 1, I64)
        if not chunk.start <= start <= start + get(location, 2, I32) <= chunk.end:
            raise ValueError(f"a page of {chunk.leaf.name} lies outside its column")
        location[1] = (I64, start + by)
    return written(struct)

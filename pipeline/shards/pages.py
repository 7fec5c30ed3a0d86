"""The pages of a column: what their headers say that decoding will cost, and how they were encoded.

Trade-off: the footer states sizes too, but nothing holds a hostile one to them; pyarrow allocates what the page headers
say. So these are walked, some microseconds a page, and of a large dictionary page the lengths of its values.
"""

from typing import Any, NamedTuple

from pipeline.shards.thrift import I32, I64, STRUCT, Struct, get, read_struct

MAX_PAGES = 100_000  # of a column chunk
MAX_PAGE_HEADER_BYTES = 1024**2
MAX_SLICE_BYTES = 256 * 1024**2  # of the rows that are decoded together
HARMLESS = 16 * 1024**2  # of a column of a row group, if all its values were the whole dictionary
WIDEST = 12  # bytes of a number; the width of other values of fixed length is the leaf's

# Field ids and values of parquet.thrift
VALUES, CODEC = 5, 4  # of ColumnMetaData
REPEATED, BYTE_ARRAY = 2, 6
_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_2 = range(4)
_DELTA_BYTE_ARRAY = 7
CODECS = {0: "none", 1: "snappy", 2: "gzip", 4: "brotli", 5: "lz4", 6: "zstd", 7: "lz4"}  # as pyarrow writes them


class Leaf(NamedTuple):
    """A column as parquet stores it. `levels` are the optional (1) and repeated (2) steps from the root to it.

    Pages of one leaf are valid in another of the same `stored`, whatever the groups between are called.
    """

    path: tuple[bytes, ...]
    stored: tuple[int, int, tuple[int, ...]]  # physical type, length of a fixed-length value, levels
    decimal: bool

    @property
    def name(self) -> str:
        return repr(b".".join(self.path).decode(errors="replace"))

    @property
    def repeated(self) -> bool:
        return REPEATED in self.stored[2]


class Chunk(NamedTuple):
    """The pages of a leaf in a row group: `view[start:end]`."""

    leaf: Leaf
    struct: Struct
    meta: Struct
    start: int
    end: int


class Pages(NamedTuple):
    """What the page headers of a chunk say; bytes are uncompressed."""

    total: int
    largest: int  # data page
    dictionary: int | None  # which may be empty, or missing
    longest: int  # value that a few bytes can repeat; 0 where every value has bytes of its own
    encodings: frozenset[int]
    second_version: bool
    checksums: bool


def walk(view: memoryview, chunk: Chunk) -> Pages:
    """Raises ValueError where the pages are not what the chunk says. The view must be safe to touch there."""
    at, values, encodings, versions, checksums = chunk.start, 0, set[int](), set[int](), False
    sizes, dictionary, longest = [0], None, chunk.leaf.stored[1]
    for number in range(MAX_PAGES + 1):
        if at == chunk.end:
            break
        header, data = read_struct(view, at, min(chunk.end, at + MAX_PAGE_HEADER_BYTES))
        kind, size, at = get(header, 1, I32), get(header, 2, I32), data + get(header, 3, I32)
        if number == MAX_PAGES or size < 0 or not data <= at <= chunk.end:
            raise ValueError(f"more than {MAX_PAGES} pages, or one that does not fit, in {chunk.leaf.name}")
        checksums |= 4 in header
        if kind == _DICTIONARY_PAGE:
            if number:
                raise ValueError(f"a dictionary behind its values in {chunk.leaf.name}")
            dictionary = size
            longest = max(longest, _longest(view, chunk, header, data, at))
        elif kind in (_DATA_PAGE, _DATA_PAGE_2):
            page = get(header, 5 if kind == _DATA_PAGE else 8, STRUCT)
            count, encoding = get(page, 1, I32), get(page, 2 if kind == _DATA_PAGE else 4, I32)
            if count < 0:
                raise ValueError(f"a page of {count} values in {chunk.leaf.name}")
            values += count
            longest = max(longest, size if encoding == _DELTA_BYTE_ARRAY else 0)
            encodings.add(encoding)
            versions.add(kind)
            sizes.append(size)
    if values != get(chunk.meta, VALUES, I64):
        raise ValueError(f"{values} values in the pages of {chunk.leaf.name}, not as stated")
    total, second = sum(sizes) + (dictionary or 0), _DATA_PAGE_2 in versions
    return Pages(total, max(sizes), dictionary, longest, frozenset(encodings), second, checksums)


def _longest(view: memoryview, chunk: Chunk, header: Struct, start: int, end: int) -> int:
    """Bytes of the longest value in a dictionary page; of the whole page where that hurts nobody or is dear to find."""
    size, count = get(header, 2, I32), get(get(header, 7, STRUCT), 1, I32)
    if chunk.leaf.stored[0] != BYTE_ARRAY:
        return WIDEST
    codec = {5: "", 7: "lz4_raw"}.get(number := get(chunk.meta, CODEC, I32), CODECS.get(number, ""))
    harmless = get(chunk.meta, VALUES, I64) * size < HARMLESS
    if harmless or size > MAX_SLICE_BYTES or count > 10**5 or not codec:
        return size
    import pyarrow as pa

    data: Any = view[start:end]
    if codec != "none":
        try:
            data = memoryview(pa.decompress(pa.py_buffer(data), decompressed_size=size, codec=codec))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"the dictionary of {chunk.leaf.name} cannot be decompressed") from error
    at = longest = 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    if at > len(data):
        raise ValueError(f"the dictionary of {chunk.leaf.name} ends within a value")
    return longest

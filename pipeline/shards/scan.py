"""The headers of a tar, in one pass: which bytes are which sample's.

USTAR, PAX and GNU names are read here, because img2dataset's tars have a PAX header before every member (webdataset
writes fractional times) and Python's `tarfile` is 12 times slower. The scan is fuzzed against `tarfile`, and refuses
what it is not sure of: it never guesses.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple
from zlib import adler32

from pipeline.errors import InputError
from pipeline.shards.reading import WINDOW, Mapping

BLOCK = 512
MAX_MEMBERS = 2_000_000
MAX_SAMPLE_BYTES = 128 * 1024**2
MAX_EXTENDED_BYTES = 1024**2  # of a PAX or GNU name header
MAX_NAME_BYTES = 4096  # PATH_MAX: a longer one names no file anywhere
MAX_PADDING = 64 * 1024**2  # zeros behind the end of the archive
# Members that common loaders would execute. They are refused, not carried along to the next reader.
_EXECUTABLE = frozenset(("pickle", "pkl", "pyd", "pt", "pth", "jl", "joblib"))
_ZEROS = bytes(BLOCK)
_REGULAR, _DIRECTORY, _EXTENDED, _GLOBAL = b"0\x007", ord("5"), b"xXgLK", ord("g")
_PAX = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_TIME = re.compile(rb"(\d\d) mtime=\d{1,12}\.\d{1,12}\n")

_Entry = tuple[bytes, int, int, int]  # name, start of its headers, start and end of its content


class Record(NamedTuple):
    """A sample as byte offsets. `parts` are (suffix, start and end of content) in file order."""

    key: str
    start: int
    end: int
    parts: list[tuple[str, int, int]]


def records(path: str, tar: Mapping) -> Iterator[Record]:
    """Neighbours that share a key; a suffix seen twice starts a new sample (LAION has such pairs at shard borders).

    A key runs to the first dot of the base name, as webdataset has it. What lies between two records belongs to none
    (directory entries and the like). The content of a yielded record can be touched safely.
    """
    suffixes: dict[bytes, str] = {}  # those that were looked at already
    parts: list[tuple[str, int, int]] = []
    firsts: dict[bytes, str] = {}  # the suffix that the samples of a key begin with
    key, begin, seen = b"", 0, set[str]()
    for name, start, data, end in _entries(path, tar):
        dot = name.find(b".", name.rfind(b"/") + 1)
        stem, raw = (name[:dot], name[dot + 1 :]) if dot >= 0 else (name, b"")
        suffix = suffixes.get(raw)
        if suffix is None:
            suffix = suffixes[raw] = _checked(path, name, raw, start)
        if stem != key or suffix in seen or not parts:
            if parts:
                yield Record(_text(key), begin, padded(parts[-1][2]), parts)
            if stem.startswith(b"/") or b".." in stem.split(b"/"):
                raise InputError(f"{path}: member {_text(name)!r} at byte {start} points outside the shard; refused")
            if firsts.setdefault(stem, suffix) != suffix:  # where one between them is dropped, they would be one
                what = "repeats its key, but begins with another suffix"
                raise InputError(f"{path}: sample {_text(stem)!r} at byte {start} {what}; refused")
            key, begin, seen, parts = stem, start, set(), []
        seen.add(suffix)
        parts.append((suffix, data, end))
        if end - begin > MAX_SAMPLE_BYTES:
            raise InputError(f"{path}: sample {_text(key)!r} has more than {MAX_SAMPLE_BYTES} bytes; refused")
    if parts:
        yield Record(_text(key), begin, padded(parts[-1][2]), parts)


def _entries(path: str, tar: Mapping) -> Iterator[_Entry]:
    """The regular members: name, start of their headers, start and end of their content. Raises InputError."""
    view, total = tar.view, tar.size
    start = offset = reached = count = 0
    long_name = b""  # from a PAX or GNU header before the member; of two, the first holds
    timed: dict[bytes, int] = {}  # PAX headers that were looked at already, and the bytes behind them
    while True:
        data = offset + BLOCK
        if data > reached:
            reached = tar.reach(data, reached)
        header = bytes(view[offset:data])
        if (size := timed.get(header, 0)) and _only_a_time(bytes(view[data : data + BLOCK]), size):
            offset = data + BLOCK
            continue
        if not header[:1].strip(b"\0") and header == _ZEROS and start == offset:
            return _check_padding(path, tar, offset, reached)
        if data > total:
            raise InputError(f"{path}: truncated at byte {total} (no end-of-archive blocks); fetch the shard again")
        size, kind = _size(path, header, offset), header[156]
        end = data + size
        offset = (end + 511) & -BLOCK
        if offset > reached:
            if offset > total:
                if kind in _REGULAR:  # not all readers see content there
                    _names_a_folder(path, header, long_name or _short_name(path, header, start), start)
                where = f"byte {total} inside {_text(_name(header))!r}"
                raise InputError(f"{path}: truncated at {where}; fetch the shard again")
            reached = tar.reach(offset, reached)
        if kind in _REGULAR:
            name = long_name or _short_name(path, header, start)
            if (kind and name[-1:] != b"/") or not _names_a_folder(path, header, name, start):
                count += 1
                yield name, start, data, end
            start, long_name = offset, b""
        elif kind == _DIRECTORY:
            start, long_name = offset, b""
        elif kind in _EXTENDED:
            if kind == _GLOBAL and start != data - BLOCK:  # it would be copied apart from the name before it
                raise InputError(f"{path}: a global header parts the one at byte {start} from its member; refused")
            if bytes(view[end:offset]).strip(b"\0"):  # some readers parse it
                raise InputError(f"{path}: there is data in the padding of the header at byte {data}; refused")
            found = _extended(path, kind, bytes(view[data:end]), data)
            long_name = long_name or found
            start = offset if kind == _GLOBAL else start
            if kind == ord("x") and size < BLOCK and len(timed) < 64:
                timed[header] = size
        else:
            what = "a link or a device" if kind in b"12346" else f"of kind {chr(kind)!r}, no plain file"
            raise InputError(f"{path}: member {_text(_name(header))!r} at byte {start} is {what}; refused")
        if count > MAX_MEMBERS:
            raise InputError(f"{path}: more than {MAX_MEMBERS} members; split the shard")


def _size(path: str, header: bytes, offset: int) -> int:
    """Bytes of content behind a header, whose checksum is verified and whose size is within bounds."""
    # The low half of Adler-32 is the sum of the bytes modulo 65521: exact for ASCII, and far faster than a sum.
    fields = header[:148] + b"        " + header[156:]
    found = (adler32(fields) & 0xFFFF) - 1 if fields.isascii() else sum(fields)
    stored, field = header[148:156].partition(b"\0")[0].strip(), header[124:136].rstrip(b"\0 ").lstrip(b" ")
    try:
        if not stored.isdigit() or ((checksum := int(stored, 8)) != found and checksum != _signed(fields)):
            raise ValueError
        if field.isdigit() or not field:
            size = int(field or b"0", 8)
        elif header[124] == 0x80:  # GNU: a number too large for octal digits
            size = int.from_bytes(header[125:136], "big")
        else:
            raise ValueError
    except ValueError:
        raise InputError(f"{path}: broken tar header at byte {offset}; fetch the shard again") from None
    if size > MAX_EXTENDED_BYTES:
        kind = header[156]
        if kind == _DIRECTORY:
            return 0  # an allowance, no content
        limit = MAX_EXTENDED_BYTES if kind in _EXTENDED else MAX_SAMPLE_BYTES
        if size > limit:
            raise InputError(f"{path}: member {_text(_name(header))!r} has {size} bytes, more than {limit}; refused")
    return size if header[156] != _DIRECTORY else 0


def _signed(fields: bytes) -> int:
    """The checksum of old tars that summed signed characters."""
    return sum(fields) - 256 * sum(byte > 127 for byte in fields)


def _extended(path: str, kind: int, content: bytes, offset: int) -> bytes:
    """The name that a PAX or GNU header gives to the member behind it, if it does.

    Readers disagree on an empty name and on what follows a NUL in one that is not made of C strings.
    """
    if kind == ord("L"):
        return _sound(path, content.split(b"\0", 1)[0], offset)
    name, position = b"", 0
    while kind != ord("K") and position < len(content) and content[position]:  # K: of a link, refused when it comes
        match = _PAX.match(content, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1] != 10:
            raise InputError(f"{path}: broken PAX header at byte {offset}; fetch the shard again")
        keyword, value = match[2], content[match.end() : end - 1]
        if keyword == b"path" and kind != _GLOBAL:
            name = _sound(path, value, offset)
        elif keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            what = "is sparse, restates its size or names all members alike"
            raise InputError(f"{path}: the PAX header at byte {offset} {what}; refused")
        position = end
    return name


def _only_a_time(block: bytes, size: int) -> bool:
    """Whether a PAX header says nothing but what webdataset's writer does: a fraction of a second."""
    match = _TIME.match(block)
    return match is not None and match.end() == size == int(match[1]) and block.endswith(_ZEROS[size:])


def _check_padding(path: str, tar: Mapping, start: int, reached: int) -> None:
    """Behind the end of the archive there may be zeros only: anything else would be smuggled through."""
    if tar.size - start > MAX_PADDING:
        raise InputError(f"{path}: {tar.size - start} bytes behind the end of the archive at byte {start}; refused")
    zeros = bytes(WINDOW)
    for at in range(start, tar.size, WINDOW):
        end = min(at + WINDOW, tar.size)
        reached = tar.reach(end, reached)
        if tar.view[at:end] != zeros[: end - at]:
            raise InputError(f"{path}: there is data behind the end of the archive at byte {start}; refused")


def padded(offset: int) -> int:
    return (offset + 511) & -BLOCK


def _sound(path: str, name: bytes, offset: int) -> bytes:
    if not 0 < len(name) <= MAX_NAME_BYTES or b"\0" in name:
        what = f"is empty, holds a NUL or is longer than {MAX_NAME_BYTES} bytes"
        raise InputError(f"{path}: the name at byte {offset} {what}; refused")
    return name


def _short_name(path: str, header: bytes, start: int) -> bytes:
    """The name in a header itself. Where POSIX has a prefix, old GNU tars have times, which some readers prepend."""
    if header[345] and header[257:263] != b"ustar\0":
        raise InputError(f"{path}: member {_text(_name(header))!r} at byte {start} has two names; refused")
    return _name(header)


def _names_a_folder(path: str, header: bytes, name: bytes, start: int) -> bool:
    """Before POSIX, a directory was an empty file whose name ends in a slash. Raises where readers differ."""
    slash = header[:100].split(b"\0", 1)[0][-1:] == b"/"
    old = slash and not header[156]
    if old != (name[-1:] == b"/") or (old and header[124:136].strip(b"\0 0")):
        raise InputError(f"{path}: member {_text(name)!r} at byte {start} is half a directory; refused")
    return old


def _name(header: bytes) -> bytes:
    end = header.find(b"\0", 0, 100)
    name = header[: end if end >= 0 else 100]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _checked(path: str, name: bytes, raw: bytes, start: int) -> str:
    """The suffix in lower case, if it is harmless."""
    suffix = _text(raw).lower()
    if suffix == ".":  # of `..`, above all
        raise InputError(f"{path}: member {_text(name)!r} at byte {start} ends in two dots; refused")
    if not _EXECUTABLE.isdisjoint(suffix.split(".")):
        raise InputError(f"{path}: member {_text(name)!r} at byte {start} could be executed by its reader; refused")
    return suffix

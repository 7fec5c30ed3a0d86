"""Webdataset tars: one pass over the headers, and a rewriter that copies byte ranges.

The scan reads USTAR, PAX and GNU names itself, because img2dataset's tars have a PAX header before every member
(webdataset writes fractional times) and Python's `tarfile` is 12 times slower; it is fuzzed against `tarfile` and
refuses what it is not sure of. A tar rebuilt from names and contents would change every header: ranges change none.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, NamedTuple
from zlib import adler32

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.manifest import Manifest
from pipeline.shards.reading import WINDOW, Mapping, read_ahead
from pipeline.shards.sample import IMAGE_SUFFIXES, Counts, Sample, UidRule, check_unique, published_uid, uid_of
from pipeline.shards.store import Shard, join, whole

BLOCK = 512
MAX_MEMBERS = 2_000_000
MAX_SAMPLE_BYTES = 128 * 1024**2
MAX_EXTENDED_BYTES = 1024**2  # of a PAX or GNU name header
MAX_PADDING = 64 * 1024**2  # zeros behind the end of the archive
# Members that common loaders would execute. They are refused, not carried along to the next reader.
_EXECUTABLE = frozenset(("pickle", "pkl", "pyd", "pt", "pth", "jl", "joblib"))
_ZEROS = bytes(BLOCK)
_REGULAR, _DIRECTORY, _EXTENDED, _GLOBAL = b"0\x007", ord("5"), b"xXgLK", ord("g")
_PAX = re.compile(rb"(\d{1,7}) ([^=\n]+)=")

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
    key, begin, seen = b"", 0, set[str]()
    for name, start, data, end in _entries(path, tar):
        dot = name.find(b".", name.rfind(b"/") + 1)
        stem, raw = (name[:dot], name[dot + 1 :]) if dot >= 0 else (name, b"")
        suffix = suffixes.get(raw)
        if suffix is None:
            suffix = suffixes[raw] = _checked(path, name, raw, start)
        if stem != key or suffix in seen or not parts:
            if parts:
                yield Record(_text(key), begin, _padded(parts[-1][2]), parts)
            if stem.startswith(b"/") or b".." in stem.split(b"/"):
                raise InputError(f"{path}: member {_text(name)!r} at byte {start} points outside the shard; refused")
            key, begin, seen, parts = stem, start, set(), []
        seen.add(suffix)
        parts.append((suffix, data, end))
        if end - begin > MAX_SAMPLE_BYTES:
            raise InputError(f"{path}: sample {_text(key)!r} has more than {MAX_SAMPLE_BYTES} bytes; refused")
    if parts:
        yield Record(_text(key), begin, _padded(parts[-1][2]), parts)


def samples(shard: Shard, uid: UidRule) -> Iterator[Sample]:
    tar = Mapping(shard.path)
    seen: list[str] = []
    for record in records(shard.path, tar):
        sample = _sample(shard, tar.view, record, uid)
        seen.append(sample.uid)
        yield sample
    check_unique(seen, shard.path)


def uids(shard: Shard, uid: UidRule) -> list[str]:
    return [sample.uid for sample in samples(shard, uid)]


def manifest(shard: Shard, uid: UidRule) -> Manifest:
    tar, found = Mapping(shard.path), Manifest()
    between = hashlib.sha256()
    position = 0
    for record in records(shard.path, tar):
        between.update(tar.view[position : record.start])
        digests, image = _digests(tar.view, record)
        found.add(_sample(shard, tar.view, record, uid).uid, record.key, digests, (record.start, *image, record.end))
        position = record.end
    between.update(tar.view[position:])
    found.between = between.digest()
    return found


def intact(shard: Shard, known: Manifest) -> bool:
    """Whether every byte is as the manifest has it; no header is parsed, so this runs at the speed of the hash."""
    tar, rows, sha256 = Mapping(shard.path), known.ranges, hashlib.sha256
    if (np.diff(rows.ravel()) < 0).any() or (len(rows) and not 0 <= rows[0, 0] <= rows[-1, 3] <= tar.size):
        return False
    digests: list[bytes] = []
    add = digests.append
    for base, window, first, last in read_ahead(tar, rows[:, 0], rows[:, 3]):
        for start, image_start, image_end, end in (rows[first:last] - base).tolist():
            rest = sha256(window[start:image_start])
            rest.update(window[image_end:end])
            add(sha256(window[image_start:image_end]).digest())
            add(rest.digest())
    between = sha256()
    for start, end in zip([0, *rows[:, 3].tolist()], [*rows[:, 0].tolist(), tar.size], strict=True):
        if start < end:
            between.update(tar.view[start:end])
    return b"".join(digests) == known.digests and between.digest() == known.between


def rewrite(
    shard: Shard, out: str, edit: Callable[[Sample], Sample | None], uid: UidRule, dropped: str | None
) -> Counts:
    counts = Counts(output=shard.output)
    clock, spent_editing = time.perf_counter(), 0.0
    tar = Mapping(shard.path)
    before, between, read = hashlib.sha256(), hashlib.sha256(), []
    with ExitStack() as files:
        kept = _Sink(files.enter_context(whole(join(out, shard.output))), tar.view)
        rest = _Sink(files.enter_context(whole(join(dropped, shard.output))), tar.view) if dropped else None
        sinks = (kept, rest) if rest else (kept,)
        position = 0
        for record in records(shard.path, tar):
            if record.start > position:  # directory entries, global headers: both shards may need them
                between.update(tar.view[position : record.start])
                for sink in sinks:
                    sink.copy(position, record.start)
            position = record.end
            sample = _sample(shard, tar.view, record, uid)
            read.append(sample.uid)
            tick = time.perf_counter()
            after = edit(sample)
            spent_editing += time.perf_counter() - tick
            digests, image = _digests(tar.view, record)
            before.update(digests)
            if after is None:
                counts.dropped += 1
                if rest:
                    rest.record(record, sample.uid, digests, image)
            elif after is sample:
                kept.record(record, sample.uid, digests, image)
            else:
                counts.changed += 1
                kept.changed(record, sample, after)
        check_unique(read, shard.path)
        between.update(tar.view[position:])
        before.update(between.digest())
        for sink in sinks:
            sink.copy(position, tar.size)
            sink.flush()
            sink.manifest.between = between.digest()
    counts.read, counts.out, counts.input_sha256 = len(read), len(kept.manifest.uids), before.hexdigest()
    kept.manifest.save(out, shard.name)
    counts.output_sha256, counts.output_bytes = kept.manifest.sha256, kept.written
    if rest and dropped:
        rest.manifest.save(dropped, shard.name)
        counts.dropped_sha256, counts.dropped_bytes = rest.manifest.sha256, rest.written
    counts.seconds["compute"] = spent_editing
    counts.seconds["write"] = time.perf_counter() - clock - spent_editing
    return counts


class _Sink:
    """A tar in the making: joins neighbouring ranges into large writes, and notes what every sample hashes to."""

    def __init__(self, file: IO[bytes], source: memoryview):
        self.file, self.source = file, source
        self.manifest, self.written = Manifest(), 0
        self._from = self._to = 0

    def record(self, record: Record, uid: str, digests: bytes, image: tuple[int, int]) -> None:
        """Copy a sample as it is."""
        start, end = record.start, record.end
        if start != self._to or end - self._from > WINDOW:
            self.flush()
            self._from = start
        shift = self.written - self._from
        self._to = end
        self.manifest.add(uid, record.key, digests, (start + shift, image[0] + shift, image[1] + shift, end + shift))

    def copy(self, start: int, end: int) -> None:
        """Copy what belongs to no sample."""
        if start != self._to:
            self.flush()
            self._from = start
        self._to = end

    def changed(self, record: Record, before: Sample, after: Sample) -> None:
        """Write a sample some of whose parts are new; its other members are copied, headers and padding included."""
        self.flush()
        image_suffix, span = _image_part(record)[0], (self.written, self.written)
        image, rest = hashlib.sha256(), hashlib.sha256()
        begin, position = self.written, record.start
        for suffix, data, end in record.parts:
            content, next_position = after.parts[suffix], _padded(end)
            header, padding = bytes(self.source[position:data]), bytes(self.source[end:next_position])
            if content is not before.parts[suffix]:
                header, padding = _resized(header, len(content)), bytes(-len(content) % BLOCK)
            if suffix == image_suffix:
                span = (self.written + len(header), self.written + len(header) + len(content))
            of_content = image if suffix == image_suffix else rest
            for piece, sha256 in ((header, rest), (content, of_content), (padding, rest)):
                sha256.update(piece)
                self.file.write(piece)
                self.written += len(piece)
            position = next_position
        digests = image.digest() + rest.digest()
        self.manifest.add(before.uid, before.key, digests, (begin, *span, self.written))

    def flush(self) -> None:
        for start in range(self._from, self._to, WINDOW):
            self.file.write(self.source[start : min(start + WINDOW, self._to)])
        self.written += self._to - self._from
        self._from = self._to


def _entries(path: str, tar: Mapping) -> Iterator[_Entry]:
    """The regular members: name, start of their headers, start and end of their content. Raises InputError."""
    view, total = tar.view, tar.size
    start = offset = reached = count = 0
    long_name = b""  # from a PAX or GNU header before the member; of two, the first holds
    while True:
        data = offset + BLOCK
        if data > reached:
            reached = tar.reach(data, reached)
        header = bytes(view[offset:data])
        if not header[:1].strip(b"\0") and header == _ZEROS and start == offset:
            return _check_padding(path, tar, offset, reached)
        if data > total:
            raise InputError(f"{path}: truncated at byte {total} (no end-of-archive blocks); fetch the shard again")
        size, kind = _size(path, header, offset), header[156]
        end = data + size
        offset = (end + 511) & -BLOCK
        if offset > reached:
            if offset > total:
                where = f"byte {total} inside {_text(_name(header))!r}"
                raise InputError(f"{path}: truncated at {where}; fetch the shard again")
            reached = tar.reach(offset, reached)
        if kind in _REGULAR:
            name = long_name or _name(header)
            if kind or not name.endswith(b"/"):  # before POSIX, that was a directory
                count += 1
                yield name, start, data, end
            start, long_name = offset, b""
        elif kind == _DIRECTORY:
            start, long_name = offset, b""
        elif kind in _EXTENDED:
            long_name = long_name or _extended(path, kind, bytes(view[data:end]), data)
            start = offset if kind == _GLOBAL else start
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
    stored, field = header[148:156].strip(b"\0 "), header[124:136].strip(b"\0 ")
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
    """The name that a PAX or GNU header gives to the member behind it, if it does."""
    if kind == ord("L"):
        return content.split(b"\0", 1)[0]
    name, position = b"", 0
    while kind != ord("K") and position < len(content) and content[position]:  # K: of a link, refused when it comes
        match = _PAX.match(content, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1] != 10:
            raise InputError(f"{path}: broken PAX header at byte {offset}; fetch the shard again")
        keyword, value = match[2], content[match.end() : end - 1]
        if keyword == b"path" and kind != _GLOBAL:
            name = value.split(b"\0", 1)[0]
        elif keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            what = "is sparse, restates its size or names all members alike"
            raise InputError(f"{path}: the PAX header at byte {offset} {what}; refused")
        position = end
    return name


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


def _padded(offset: int) -> int:
    return (offset + 511) & -BLOCK


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
    if not _EXECUTABLE.isdisjoint(suffix.split(".")):
        raise InputError(f"{path}: member {_text(name)!r} at byte {start} could be executed by its reader; refused")
    return suffix


def _sample(shard: Shard, tar: memoryview, record: Record, rule: UidRule) -> Sample:
    parts = {suffix: tar[data:end] for suffix, data, end in record.parts}
    return Sample(record.key, uid_of(record.key, shard.name, published_uid(parts), rule), parts)


def _image_part(record: Record) -> tuple[str, int, int]:
    """Suffix, start and end of the image that `Sample.image` gives; an empty one where there is none."""
    found = {suffix: (suffix, data, end) for suffix, data, end in record.parts}
    return next((found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found), ("", record.start, record.start))


def _digests(tar: memoryview, record: Record) -> tuple[bytes, tuple[int, int]]:
    """sha256 of the image and of the rest, and where the image lies."""
    _, data, end = _image_part(record)
    rest = hashlib.sha256(tar[record.start : data])
    rest.update(tar[end : record.end])
    return hashlib.sha256(tar[data:end]).digest() + rest.digest(), (data, end)


def _resized(headers: bytes, size: int) -> bytes:
    """The member's own header blocks with another size: name, owner, mode and time stay as they were."""
    extended, last = headers[:-BLOCK], bytearray(headers[-BLOCK:])
    last[124:136] = b"%011o\0" % size
    last[148:156] = b" " * 8
    last[148:156] = b"%06o\0 " % sum(last)
    return extended + bytes(last)

"""Webdataset tars: a 512-byte header scan over the mapped file, and a rewriter that copies byte ranges.

The scan reads plain USTAR itself and hands everything else (PAX, GNU long names) to `tarfile`; it never guesses.
Python's `tarfile` alone would be 12 times slower; a tar rebuilt by it would change every header.
"""

import hashlib
import io
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from pipeline.errors import InputError
from pipeline.shards.sample import Counts, Sample, UidRule, check_unique, published_uid, uid_of
from pipeline.shards.store import Shard, join, view, whole

BLOCK = 512
MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 512 * 1024**2
CHUNK = 8 * 1024**2
# Members that common loaders would execute. They are refused, not carried along to the next reader.
_EXECUTABLE = frozenset(("pickle", "pkl", "pyd", "pt", "pth", "jl", "joblib"))
_ZEROS = bytes(BLOCK)
_OCTAL = re.compile(rb"[0-7]*")


class Member(NamedTuple):
    """Byte offsets into the tar: [start, data) headers, [data, data + size) content, padding up to end."""

    name: str
    start: int
    data: int
    size: int
    end: int


def _bound(path: str, found: list[Member]) -> None:
    if len(found) > MAX_MEMBERS:
        raise InputError(f"{path}: more than {MAX_MEMBERS} members; split the shard")


class _NotPlain(Exception):
    """A header that only `tarfile` may interpret."""


def members(shard: Shard, buffer: memoryview) -> tuple[list[Member], int]:
    """All regular members in order, and the offset where the end-of-archive blocks start."""
    try:
        found, tail = _scan(shard.path, buffer)
    except _NotPlain:
        found, tail = _tarfile_scan(shard.path, buffer)
    rest = bytes(buffer[tail:])
    if rest.count(0) != len(rest):
        raise InputError(f"{shard.path}: there is data behind the end of the archive at byte {tail}; refused")
    for member in found:
        _check(shard.path, member)
    return found, tail


def samples(shard: Shard, uid: UidRule) -> Iterator[Sample]:
    buffer = view(shard.path)
    groups = _groups(members(shard, buffer)[0])
    found = [_sample(shard, buffer, group, uid) for group in groups]
    check_unique([s.uid for s in found], shard.path)
    yield from found


def uids(shard: Shard, uid: UidRule) -> list[str]:
    return [sample.uid for sample in samples(shard, uid)]


def rewrite(shard: Shard, out: str, edit: Callable[[Sample], Sample | None], uid: UidRule) -> Counts:
    counts = Counts(output=shard.file)
    clock = time.perf_counter()
    buffer = view(shard.path)
    counts.input_sha256 = hashlib.sha256(buffer).hexdigest()
    found, tail = members(shard, buffer)
    groups = _groups(found)
    before = [_sample(shard, buffer, group, uid) for group in groups]
    check_unique([s.uid for s in before], shard.path)
    counts.seconds["read"] = time.perf_counter() - clock
    spent_editing = 0.0
    with whole(join(out, shard.file)) as file:
        sink = _Sink(file, buffer)
        position = 0
        for group, sample in zip(groups, before, strict=True):
            start, end = group[0].start, group[-1].end
            sink.copy(position, start)  # directory entries and the like between samples
            tick = time.perf_counter()
            after = edit(sample)
            spent_editing += time.perf_counter() - tick
            counts.read += 1
            if after is None:
                counts.dropped += 1
            elif after is sample:
                counts.out += 1
                sink.copy(start, end)
            else:
                counts.out += 1
                counts.changed += 1
                _write_changed(sink, buffer, group, sample, after)
            position = end
        sink.copy(position, tail)
        sink.copy(tail, len(buffer))
        sink.flush()
    counts.output_sha256, counts.output_bytes = sink.sha256.hexdigest(), sink.written
    counts.seconds["compute"] = spent_editing
    counts.seconds["write"] = time.perf_counter() - clock - counts.seconds["read"] - spent_editing
    return counts


class _Sink:
    """Joins neighbouring ranges into large writes and hashes what it writes."""

    def __init__(self, file: IO[bytes], source: memoryview):
        self.file, self.source = file, source
        self.sha256, self.written = hashlib.sha256(), 0
        self._from = self._to = 0

    def copy(self, start: int, end: int) -> None:
        if start != self._to:
            self.flush()
            self._from = start
        self._to = end

    def put(self, data: bytes | memoryview) -> None:
        self.flush()
        self._emit(data)

    def flush(self) -> None:
        for start in range(self._from, self._to, CHUNK):
            self._emit(self.source[start : min(start + CHUNK, self._to)])
        self._from = self._to

    def _emit(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.written += len(data)


def _scan(path: str, buffer: memoryview) -> tuple[list[Member], int]:
    found: list[Member] = []
    offset, total = 0, len(buffer)
    while True:
        header = bytes(buffer[offset : offset + BLOCK])
        if len(header) < BLOCK:
            raise InputError(f"{path}: truncated at byte {offset} (no end-of-archive blocks); fetch the shard again")
        if header[0] == 0 and header == _ZEROS:
            return found, offset
        kind = header[156:157]
        if kind in b"xgLKSX":
            raise _NotPlain
        if kind not in b"0\x005":
            raise InputError(f"{path}: member {_name(header)!r} at byte {offset} is a link or a device; refused")
        size_field, sum_field = header[124:136].strip(b"\0 "), header[148:156].strip(b"\0 ")
        if not (_OCTAL.fullmatch(size_field) and _OCTAL.fullmatch(sum_field)):
            raise _NotPlain  # base-256 sizes and odd padding
        size, checksum = int(size_field or b"0", 8), int(sum_field or b"0", 8)
        if checksum != sum(header) - sum(header[148:156]) + 256:
            raise InputError(f"{path}: broken tar header at byte {offset}; fetch the shard again")
        data = offset + BLOCK
        end = data + -(-size // BLOCK) * BLOCK
        if end > total:
            raise InputError(f"{path}: truncated at byte {total} inside {_name(header)!r}; fetch the shard again")
        if kind != b"5":
            found.append(Member(_name(header), offset, data, size, end))
            _bound(path, found)
        offset = end


def _tarfile_scan(path: str, buffer: memoryview) -> tuple[list[Member], int]:
    found: list[Member] = []
    try:
        # errorlevel and ignore_zeros stay at their strict values: a hole is an error, not the end
        with tarfile.open(fileobj=_Reader(buffer), mode="r:") as archive:
            end = 0
            for info in archive:
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK if info.isreg() else info.offset_data
                if end > len(buffer):
                    raise InputError(f"{path}: truncated at byte {len(buffer)} inside {info.name!r}")
                if info.issym() or info.islnk() or info.isdev():
                    raise InputError(f"{path}: member {info.name!r} is a link or a device; refused")
                if info.isreg():
                    if info.issparse() or "size" in info.pax_headers:
                        raise InputError(f"{path}: member {info.name!r} is sparse or restates its size; refused")
                    found.append(Member(info.name, info.offset, info.offset_data, info.size, end))
                    _bound(path, found)
    except (tarfile.TarError, ValueError) as error:
        raise InputError(f"{path}: not a readable tar ({error}); fetch the shard again") from error
    if bytes(buffer[end : end + BLOCK]) != _ZEROS:
        raise InputError(f"{path}: truncated or broken at byte {end}; fetch the shard again")
    return found, end


class _Reader(io.RawIOBase):
    """A file over a memoryview that copies only what is read."""

    def __init__(self, buffer: memoryview):
        self.buffer, self.position = buffer, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, len(self.buffer))[whence]
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        end = len(self.buffer) if size is None or size < 0 else self.position + size
        data = bytes(self.buffer[self.position : end])
        self.position += len(data)
        return data


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _check(path: str, member: Member) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise InputError(f"{path}: member {name!r} at byte {member.start} points outside the shard; refused")
    if not _EXECUTABLE.isdisjoint(_split(name)[1].split(".")):
        raise InputError(f"{path}: member {name!r} at byte {member.start} could be executed by its reader; refused")
    if member.size > MAX_MEMBER_BYTES:
        raise InputError(f"{path}: member {name!r} has {member.size} bytes, more than {MAX_MEMBER_BYTES}; refused")


def _split(name: str) -> tuple[str, str]:
    """`a/b.c.d` -> (`a/b`, `c.d`): the key runs to the first dot of the base name, as webdataset has it."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _groups(found: list[Member]) -> list[list[Member]]:
    """Neighbours that share a key; a suffix seen twice starts a new sample (LAION has such pairs at shard borders)."""
    groups: list[list[Member]] = []
    key, seen = None, set[str]()
    for member in found:
        member_key, suffix = _split(member.name)
        if member_key != key or suffix in seen:
            groups.append([])
            key, seen = member_key, set()
        groups[-1].append(member)
        seen.add(suffix)
    return groups


def _sample(shard: Shard, buffer: memoryview, group: list[Member], rule: UidRule) -> Sample:
    key = _split(group[0].name)[0]
    parts = {_split(m.name)[1]: buffer[m.data : m.data + m.size] for m in group}
    return Sample(key, uid_of(key, shard.name, published_uid(parts), rule), parts)


def _write_changed(sink: _Sink, buffer: memoryview, group: list[Member], before: Sample, after: Sample) -> None:
    for member in group:
        suffix = _split(member.name)[1]
        data = after.parts[suffix]
        if data is before.parts[suffix]:
            sink.copy(member.start, member.end)
            continue
        sink.put(_header(bytes(buffer[member.start : member.data]), len(data)))
        sink.put(data)
        sink.put(bytes(-len(data) % BLOCK))


def _header(headers: bytes, size: int) -> bytes:
    """The member's own header blocks with another size: name, owner, mode and time stay as they were."""
    extended, last = headers[:-BLOCK], bytearray(headers[-BLOCK:])
    last[124:136] = b"%011o\0" % size
    last[148:156] = b" " * 8
    last[148:156] = b"%06o\0 " % sum(last)
    return extended + bytes(last)

"""Webdataset tars: samples as views into the mapped file, and a rewriter that copies byte ranges.

A tar rebuilt from names and contents would change every header; ranges change none, and need no decoding. They are
written from the mapped file: `copy_file_range` was measured to be no faster, since the bytes are read to be hashed.
"""

import hashlib
import itertools
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.manifest import Manifest
from pipeline.shards.reading import WINDOW, Mapping, read_ahead
from pipeline.shards.sample import IMAGE_SUFFIXES, Counts, Sample, UidRule, check_unique, published_uid, uid_of
from pipeline.shards.scan import BLOCK, Record, padded, records
from pipeline.shards.store import Shard, join, whole


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
    clock, spent_editing, before = time.perf_counter(), 0.0, Manifest()
    tar = Mapping(shard.path)
    with ExitStack() as files:
        kept = _Sink(files.enter_context(whole(join(out, shard.output))), tar.view)
        rest = _Sink(files.enter_context(whole(join(dropped, shard.output))), tar.view) if dropped else None
        sinks = (kept, rest) if rest else (kept,)
        position = 0
        for record in records(shard.path, tar):
            for sink in sinks:
                sink.between(position, record.start)
            position = record.end
            sample = _sample(shard, tar.view, record, uid)
            tick = time.perf_counter()
            after = edit(sample)
            spent_editing += time.perf_counter() - tick
            digests, image = _digests(tar.view, record)
            before.add(sample.uid, record.key, digests, (record.start, *image, record.end))
            if after is None:
                counts.dropped += 1
                if rest:
                    rest.record(record, sample.uid, digests, image)
            elif after is sample:
                kept.record(record, sample.uid, digests, image)
            else:
                counts.changed += 1
                kept.changed(record, sample, after)
        check_unique(before.uids, shard.path)
        for sink in sinks:
            sink.between(position, tar.size)
            sink.finish()
    kept.manifest.save(out, shard.name)
    before.between = kept.manifest.between
    counts.read, counts.out, counts.input_sha256 = len(before.uids), len(kept.manifest.uids), before.sha256
    counts.output_sha256, counts.output_bytes = kept.manifest.sha256, kept.written
    if rest and dropped:
        rest.manifest.save(dropped, shard.name)
        counts.dropped_sha256, counts.dropped_bytes = rest.manifest.sha256, rest.written
    counts.seconds["compute"] = spent_editing
    counts.seconds["write"] = time.perf_counter() - clock - spent_editing
    return counts


def concatenate(pieces: Sequence[tuple[Shard, int, int]], path: str, uid: UidRule) -> tuple[Manifest, int]:
    """Returns the manifest of the tar at `path`, and its bytes."""
    with whole(path) as file:
        sink, firsts = _Sink(file, memoryview(b"")), dict[str, str]()
        for shard, first, n in pieces:
            tar, position = Mapping(shard.path), 0
            sink.source = tar.view
            for i, record in enumerate(itertools.islice(records(shard.path, tar), first + n)):
                if i >= first:
                    if firsts.setdefault(record.key, record.parts[0][0]) != record.parts[0][0]:
                        what = "repeats the key of another, but begins with another suffix: they would run together"
                        raise InputError(f"{shard.path}: sample {record.key!r} {what}; refused")
                    sink.between(position, record.start)
                    digests, image = _digests(tar.view, record)
                    sink.record(record, _sample(shard, tar.view, record, uid).uid, digests, image)
                position = record.end
            sink.flush()
        end = 2 * BLOCK + -(sink.written + 2 * BLOCK) % tarfile.RECORDSIZE
        sink.source = memoryview(bytes(end))
        sink.between(0, end)
        sink.finish()
    return sink.manifest, sink.written


class _Sink:
    """A tar in the making: joins neighbouring ranges into large writes, and notes what every sample hashes to."""

    def __init__(self, file: IO[bytes], source: memoryview):
        self.file, self.source = file, source
        self.manifest, self.written = Manifest(), 0
        self._between = hashlib.sha256()
        self._from = self._to = 0

    def record(self, record: Record, uid: str, digests: bytes, image: tuple[int, int]) -> None:
        """Copy a sample as it is."""
        shift = self._copy(record.start, record.end)
        start, end = record.start + shift, record.end + shift
        self.manifest.add(uid, record.key, digests, (start, image[0] + shift, image[1] + shift, end))

    def between(self, start: int, end: int) -> None:
        """Copy what belongs to no sample: directory entries, global headers, the end blocks."""
        if start < end:
            self._between.update(self.source[start:end])
            self._copy(start, end)

    def _copy(self, start: int, end: int) -> int:
        """Returns how much further back in the output the range lies."""
        if start != self._to or end - self._from > WINDOW:
            self.flush()
            self._from = start
        self._to = end
        return self.written - self._from

    def changed(self, record: Record, before: Sample, after: Sample) -> None:
        """Write a sample some of whose parts are new; its other members are copied, headers and padding included."""
        self.flush()
        image_suffix, span = _image_part(record)[0], (self.written, self.written)
        image, rest = hashlib.sha256(), hashlib.sha256()
        begin, position = self.written, record.start
        for suffix, data, end in record.parts:
            content, next_position = after.parts[suffix], padded(end)
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

    def finish(self) -> None:
        self.flush()
        self.manifest.between = self._between.digest()


def _sample(shard: Shard, tar: memoryview, record: Record, rule: UidRule) -> Sample:
    parts = {suffix: tar[data:end] for suffix, data, end in record.parts}
    return Sample(record.key, uid_of(record.key, shard.name, published_uid(parts), rule), parts)


def _image_part(record: Record) -> tuple[str, int, int]:
    """Suffix, start and end of the image that `Sample.image` gives; an empty one where there is none."""
    first = record.parts[0]
    if first[0] == IMAGE_SUFFIXES[0]:  # as nearly always
        return first
    found = {part[0]: part for part in record.parts}
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

"""What must hold for the bytes of strangers: one function a reader, for hypothesis and for atheris alike.

Each takes bytes and an empty folder to work in, and returns whether the reader accepted them. InputError and Rejected
are answers; any other exception is a finding. `tarfile` and `gzip` are the references: where they read the same bytes
without complaint and we do too, both must have seen the same.
"""

import gzip as gzips
import json as jsons
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.shards import Manifest, Rejected, Sample, Shard, intact, rewrite, samples, uids
from pipeline.shards import manifest as manifest_of
from pipeline.shards.image import decode, encode, pixels
from pipeline.shards.manifest import manifest_path, read_manifest
from pipeline.shards.reading import Mapping
from pipeline.shards.sample import published_uid
from pipeline.shards.scan import Record, records
from pipeline.tables import CAPTION

BLOCK = 512
SIZE = 32  # of the pixels that are asked for
# Why a shard may be refused: SECURITY.md has the list. The first two mean damage, which `tarfile` must see as well.
DAMAGED = r"truncated at byte|broken tar header"
REFUSED = re.compile(
    DAMAGED + r"|broken PAX header|is sparse, restates its size|points outside the shard|could be executed"
    r"|a link or a device|no plain file|more than \d+|behind the end of the archive|half a directory|two names"
    r"|two dots|parts the one at byte|in the padding of the header|is empty, holds a NUL or is longer"
    r"|occurs more than once|repeats its key|unpacks to more than|not a readable gzip file"
)


class Member(NamedTuple):
    """A plain file in a tar: its name, where its first header and its content start, and the content."""

    name: bytes
    start: int
    data: int
    content: bytes


def tar(data: bytes, folder: Path) -> bool:
    """Accepted means: as tarfile has it, copied to the byte, and every change to it is noticed."""
    path = folder / "0.tar"
    path.write_bytes(data)
    theirs = by_tarfile(path)
    try:
        ours = list(records(str(path), Mapping(str(path))))
        uids(Shard(str(path)))
    except InputError as error:
        assert REFUSED.search(str(error)), error
        assert theirs is None or not re.search(DAMAGED, str(error)) or _odd_number(data, error), error
        return False
    if theirs is not None:
        assert _flat(ours, data) == [(_split(m.name), m.data, m.content) for m in theirs]
        starts = {m.data: m.start for m in theirs}
        assert all(record.start == starts[record.parts[0][1]] for record in ours)
    _copies(Shard(str(path)), data, [data[record.start : record.end] for record in ours])
    return True


def gzip(data: bytes, folder: Path) -> bool:
    """A compressed tar is what Python unpacks, or it is refused."""
    path = folder / "0.tar.gz"
    path.write_bytes(data)
    try:
        found = manifest_of(Shard(str(path)))
    except InputError as error:
        assert REFUSED.search(str(error)), error
        return False
    unpacked = folder / "0.tar"
    unpacked.write_bytes(gzips.decompress(data))
    assert manifest_of(Shard(str(unpacked))) == found
    return True


def parquet(data: bytes, folder: Path) -> bool:
    """Rows, uids, manifest and copy agree with each other."""
    path = folder / "0.parquet"
    path.write_bytes(data)
    shard, out = Shard(str(path)), folder / "out"
    try:
        found = list(samples(shard))
        assert uids(shard) == [sample.uid for sample in found]
        known = manifest_of(shard)
        out.mkdir(exist_ok=True)
        counts = rewrite(shard, str(out), lambda sample: sample)
    except InputError:
        return False
    assert known.uids == [sample.uid for sample in found]
    assert intact(shard, known)
    assert (counts.read, counts.out, counts.dropped) == (len(found), len(found), 0)
    assert (out / "0.parquet").read_bytes() == data
    _only(folder, {"0.parquet", "out/0.parquet", "out/0.manifest.parquet"})
    return True


def json(data: bytes, folder: Path) -> bool:
    """A json part is read as Python reads it, and only its captions change."""
    sample = Sample("key", "0" * 32, {"jpg": b"", "json": data})
    uid = published_uid(sample.parts)
    meta = dict(sample.meta)
    try:
        caption = sample.caption
        assert caption.strip()
        caption.encode()
        changed = sample.changed(caption="another caption")
    except Rejected:
        return False
    assert uid is None or repr(uid) == repr(meta.get("uid"))  # NaN is not itself
    old = next((meta[key] for key in CAPTION if meta.get(key)), None)
    expected = {**meta, **{key: "another caption" for key in CAPTION if key in meta and meta[key] == old}}
    assert jsons.dumps(dict(changed.meta)) == jsons.dumps(expected)
    return True


def image(data: bytes, folder: Path) -> bool:
    """What decodes can be resized, and encoded as it came where its tables can be written again."""
    sample = Sample("key", "0" * 32, {"jpg": data})
    try:
        found = decode(data)
        assert found.mode == "RGB"
        assert pixels(sample, SIZE).shape == (SIZE, SIZE, 3)
        again = encode(found, like=data)
    except Rejected:
        return False
    assert decode(again).size == found.size
    return True


def manifest(data: bytes, folder: Path) -> bool:
    """A forged manifest is refused, or it is checked like any other against the shard at `folder/0.tar`."""
    shard = Shard(str(folder / "0.tar"))
    Path(manifest_path(str(folder), "0")).write_bytes(data)
    try:
        found = read_manifest(str(folder), "0")
    except InputError:
        return False
    assert len(found.uids) == len(found.keys) == len(found.ranges) == len(found.digests) / 64
    if shard_is_there := Path(shard.path).exists():
        assert intact(shard, found) == _same(found, manifest_of(shard))
    return shard_is_there


def by_tarfile(path: Path) -> list[Member] | None:
    """The plain files as Python's tarfile has them, or None where it complains or stops before the end blocks.

    It reads the numbers of owner and time too, which nothing here depends on; broken ones end its reading.
    """
    raw = path.read_bytes()
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            found = list(archive)
            stopped = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError):  # seeks to where a size sends it
        return None
    if raw[stopped : stopped + BLOCK] != bytes(BLOCK) or not all(info.isreg() or info.isdir() for info in found):
        return None
    return [
        Member(
            info.name.encode("utf-8", "surrogateescape"),
            info.offset,
            info.offset_data,
            raw[info.offset_data : info.offset_data + info.size],
        )
        for info in found
        if info.isreg()
    ]


def repaired(data: bytes) -> bytes:
    """The tar with right checksums, so that a mutated header gets past the first check."""
    out, at = bytearray(data), 0
    while at + BLOCK <= len(out) and any(out[at : at + BLOCK]):
        header = out[at : at + BLOCK]
        header[148:156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        digits = bytes(header[124:136]).strip(b"\0 ")
        at += BLOCK + -(-int(digits, 8) // BLOCK) * BLOCK if re.fullmatch(rb"[0-7]+", digits) else BLOCK
    return bytes(out)


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def _copies(shard: Shard, data: bytes, pieces: list[bytes]) -> None:
    """Identity gives the same file, a dropped sample takes nothing else along, and a flipped bit shows."""
    folder = Path(shard.path).parent
    out, some = folder / "out", folder / "some"
    out.mkdir(exist_ok=True)
    some.mkdir(exist_ok=True)
    known = manifest_of(shard)
    counts = rewrite(shard, str(out), lambda sample: sample)
    assert (out / "0.tar").read_bytes() == data
    assert counts.output_sha256 == known.sha256
    assert _same(read_manifest(str(out), "0"), known)
    chosen = set(known.uids[::2])
    rewrite(shard, str(some), lambda sample: sample if sample.uid in chosen else None)
    left = (some / "0.tar").read_bytes()
    rows = list(records(shard.path, Mapping(str(some / "0.tar"))))
    assert [left[row.start : row.end] for row in rows] == pieces[::2]
    assert intact(shard, known)
    bit = zlib.crc32(data) % (8 * len(data))
    Path(shard.path).write_bytes(flipped(data, bit))
    assert not intact(shard, known), f"bit {bit}"
    made = {f"{name}/{file}" for name in ("out", "some") for file in ("0.tar", "0.manifest.parquet")}
    _only(folder, {"0.tar", *made})


def _only(folder: Path, expected: set[str]) -> None:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == expected, found ^ expected


def _same(one: Manifest, two: Manifest) -> bool:
    """Whether they describe the same bytes; a key that is no UTF-8 is spelled out in a file."""
    return (one.digests, one.between) == (two.digests, two.between) and np.array_equal(one.ranges, two.ranges)


def _flat(found: list[Record], data: bytes) -> list[tuple[tuple[bytes, str], int, bytes]]:
    return [
        ((record.key.encode("utf-8", "surrogateescape"), suffix), start, data[start:end])
        for record in found
        for suffix, start, end in record.parts
    ]


def _split(name: bytes) -> tuple[bytes, str]:
    """Key and suffix: to the first dot of the base name, as webdataset has it."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, suffix = base.partition(b".")
    return folder + slash + stem, suffix.decode("utf-8", "surrogateescape").lower()


def _odd_number(data: bytes, error: InputError) -> bool:
    """Whether the header that is called broken spells its size or checksum as only some readers understand it."""
    place = re.search(r"broken tar header at byte (\d+)", str(error))
    header = data[int(place[1]) :] if place else b""
    size = re.fullmatch(rb" *[0-7]*[\0 ]*|\x80.{11}", header[124:136], re.DOTALL)
    return bool(place) and not (size and re.fullmatch(rb"\s*[0-7]+\s*(\0.*)?", header[148:156], re.DOTALL))


PROPERTIES: dict[str, Callable[[bytes, Path], bool]] = {
    "tar": tar,
    "gzip": gzip,
    "parquet": parquet,
    "json": json,
    "image": image,
    "manifest": manifest,
}

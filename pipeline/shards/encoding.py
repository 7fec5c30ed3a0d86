"""How an image is encoded, read off its bytes and not its pixels: segments of JPEG, chunks of PNG and WebP.

Trade-off: Pillow names few of these facts and writes fewer, so the containers are walked here. Only their outer layer
is: what lies within a segment is copied, never interpreted. Sources: ITU T.81; the PNG specification; RFC 6386 (VP8).
"""

import io
import re
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from pipeline.shards.sample import Rejected

Parts = list[tuple[int, bytes]]  # JPEG: marker, and the segment from its marker on
Chunks = list[tuple[bytes, bytes]]  # PNG, WebP: type and data

MAX_PARTS = 10_000  # of one image; a photograph has twenty
SOI, EOI, SOS, DQT, DHT, DRI, COM, APP0, APP1, APP2, ADOBE = (
    0xD8,
    0xD9,
    0xDA,
    0xDB,
    0xC4,
    0xDD,
    0xFE,
    0xE0,
    0xE1,
    0xE2,
    0xEE,
)
FRAMES = {*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ALONE = {SOI, EOI, 0x01}
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not: stuffing, restart, fill


def jpeg_parts(data: bytes) -> Parts:
    """The segments in file order; a scan belongs to its SOS, and whatever trails the end to the EOI.

    Joined, they are the file again. Raises Rejected where a segment is longer than the file.
    """
    parts: Parts = []
    at = 0
    while found := _MARKER.match(data, at):
        marker = found[1][0]
        end = at + 2
        if marker == EOI:
            return [*parts, (EOI, data[at:])]
        if marker not in _ALONE:
            end += int.from_bytes(data[end : end + 2], "big")
            if end < at + 4 or end > len(data):
                raise Rejected("JPEG segment beyond the end")
        following = _MARKER.search(data, end)
        end = following.start() if following else len(data)
        parts.append((marker, data[at:end]))
        at = end
        if len(parts) > MAX_PARTS:
            raise Rejected(f"more than {MAX_PARTS} JPEG segments")
    if not parts:
        raise Rejected("not a JPEG")
    return parts


def header(parts: Parts) -> Parts:
    """The segments before the first scan."""
    return parts[: next((i for i, (marker, _) in enumerate(parts) if marker == SOS), len(parts))]


def frame(parts: Parts) -> tuple[int, list[tuple[int, int, int]]]:
    """The marker of the frame, and for each component its id, sampling factors (a byte) and quantisation table."""
    marker, found = next(((m, part) for m, part in header(parts) if m in FRAMES), (0, b""))
    count = found[9] if len(found) > 9 else 0
    if not count or len(found) < 10 + 3 * count:
        raise Rejected("JPEG without a frame header")
    return marker, [struct.unpack_from("3B", found, 10 + 3 * i) for i in range(count)]


def huffman_tables(parts: Parts) -> set[bytes]:
    """The Huffman tables that are defined before the first scan: class and id, 16 counts, the symbols."""
    tables = set()
    for _, part in (p for p in header(parts) if p[0] == DHT):
        at, end = 4, min(len(part), 2 + int.from_bytes(part[2:4], "big"))
        while at + 17 <= end:
            size = 17 + sum(part[at + 1 : at + 17])
            tables.add(part[at : at + size])
            at += size
    return tables


def has_standard_huffman(parts: Parts) -> bool:
    """Whether all tables are those of T.81 annex K, which encoders write that do not optimise."""
    tables = huffman_tables(parts)
    return bool(tables) and tables <= _annex_k()


@cache
def _annex_k() -> set[bytes]:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return huffman_tables(jpeg_parts(out.getvalue()))


def restart_interval(parts: Parts) -> int:
    return next((int.from_bytes(part[4:6], "big") for marker, part in header(parts) if marker == DRI), 0)


def adobe_transform(parts: Parts) -> int | None:
    """0: RGB or CMYK, 1: YCbCr, 2: YCCK; None without Adobe's segment."""
    for marker, part in header(parts):
        if marker == ADOBE and part[4:9] == b"Adobe" and len(part) >= 16:
            return part[15]
    return None


def is_jfif(parts: Parts) -> bool:
    return any(marker == APP0 and part[4:9] == b"JFIF\0" for marker, part in header(parts))


def png_chunks(data: bytes) -> Chunks:
    """The chunks in file order. Type b"" holds what trails IEND. Raises Rejected where one is longer than the file."""
    if not data.startswith(PNG_SIGNATURE):
        raise Rejected("not a PNG")
    chunks: Chunks = []
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + size > len(data):
            break
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size
        if kind == b"IEND":
            return [*chunks, (b"", data[at:])]
        if len(chunks) > MAX_PARTS:
            raise Rejected(f"more than {MAX_PARTS} PNG chunks")
    raise Rejected("PNG chunk beyond the end")


def write_png(chunks: Chunks) -> bytes:
    out = bytearray(PNG_SIGNATURE)
    for kind, data in chunks:
        out += data if not kind else struct.pack(">I", len(data)) + kind + data + struct.pack(">I", _crc(kind, data))
    return bytes(out)


def _crc(kind: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(kind))


def webp_chunks(data: bytes) -> Chunks:
    """The chunks of the RIFF container in file order. Raises Rejected where one is longer than the file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise Rejected("not a WebP")
    chunks: Chunks = []
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > len(data) or len(chunks) >= MAX_PARTS:
            raise Rejected("WebP chunk beyond the end, or too many")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return chunks


def write_webp(chunks: Chunks) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def first_frame(chunks: Chunks) -> tuple[bytes, bytes]:
    """Type (VP8 or VP8L) and data of the picture, or of the first of an animation. Raises Rejected without one."""
    for kind, data in chunks:
        if kind == b"ANMF":
            return first_frame([c for c in webp_chunks(b"RIFF    WEBP" + data[16:]) if c[0] != kind])
        if kind in (b"VP8 ", b"VP8L"):
            return kind, data
    raise Rejected("WebP without a picture")


def quantisers(data: bytes) -> list[int]:
    """The quantiser indices (0 to 127) of the segments of a VP8 key frame: what the encoder made of its quality.

    RFC 6386, section 9: the frame header is read up to `y_ac_qi`. One value where there are no segments.
    """
    if len(data) < 10 or data[3:6] != b"\x9d\x01\x2a":
        raise Rejected("not a VP8 key frame")
    read = _Bits(data[10 : 10 + 256])
    read(2)  # colour space, clamping
    values, absolute = [0], False
    if read(1):
        with_map, with_values = read(1), read(1)
        if with_values:
            absolute = bool(read(1))
            values = [read.signed(7) for _ in range(4)]
            for _ in range(4):
                read.signed(6)  # loop filter
        if with_map:
            for _ in range(3):
                if read(1):
                    read(8)
    read(10)  # loop filter: type, level, sharpness
    if read(1) and read(1):
        for _ in range(8):
            read.signed(6)
    read(2)  # partitions
    base = read(7)
    return [min(max(value + base * (not absolute), 0), 127) for value in values]


class _Bits:
    """Bits of even odds from VP8's arithmetic decoder (RFC 6386, section 7); zeros behind the end."""

    def __init__(self, data: bytes):
        self.data, self.at, self.range, self.left = data + bytes(2), 2, 255, 8
        self.value = int.from_bytes(self.data[:2], "big")

    def __call__(self, count: int) -> int:
        number = 0
        for _ in range(count):
            split = 1 + (self.range - 1) // 2
            bit = self.value >= split << 8
            if bit:
                self.value -= split << 8
            self.range = self.range - split if bit else split
            while self.range < 128:
                self.range, self.value, self.left = self.range * 2, self.value * 2, self.left - 1
                if not self.left:
                    self.left = 8
                    self.value |= self.data[self.at] if self.at < len(self.data) else 0
                    self.at += 1
            number = 2 * number + bit
        return number

    def signed(self, count: int) -> int:
        """An optional number with a sign behind it."""
        if not self(1):
            return 0
        number = self(count)
        return -number if self(1) else number


# Facts


def facts(data: bytes) -> dict[str, float]:
    """What a header says, in numbers; a fact is missing where the format has none such. Raises Rejected."""
    if data.startswith(PNG_SIGNATURE):
        return _of_png(png_chunks(data))
    if data[:4] == b"RIFF":
        return _of_webp(webp_chunks(data))
    return _of_jpeg(jpeg_parts(data))


def _of_jpeg(parts: Parts) -> dict[str, float]:
    marker, components = frame(parts)
    head = header(parts)
    kinds = [kind for kind, _ in head]
    of = dict(reversed(head))
    tables = _quantisation(b"".join(part[4:] for kind, part in head if kind == DQT))
    luma, chroma = tables.get(components[0][2], [np.nan]), tables.get(components[-1][2], [np.nan])
    return {
        "container": 0,
        "bytes": sum(len(part) for _, part in head),
        "parts": len(head),
        "order": code(*kinds),
        "exif": _starts(of.get(APP1), b"Exif"),
        "icc": _starts(of.get(APP2), b"ICC_PROFILE"),
        "comment": COM in of,
        "trailing": len(parts[-1][1]) - 2 if parts[-1][0] == EOI else -1,
        "components": len(components),
        "tables": len(tables),
        "luma": float(np.sum(luma)),
        "chroma": float(np.sum(chroma)),
        "luma_dc": float(luma[0]),
        "sampling": components[0][1],
        "progressive": marker in PROGRESSIVE,
        "jfif": is_jfif(parts),
        "density": code(of[APP0][11:16]) if APP0 in of else 0,
        "adobe": -1 if (transform := adobe_transform(parts)) is None else transform,
        "restart": restart_interval(parts),
        "huffman_standard": has_standard_huffman(parts),
        "huffman_tables": len(huffman_tables(parts)),
    }


def _starts(part: bytes | None, name: bytes) -> bool:
    return part is not None and part[4 : 4 + len(name)] == name


def _quantisation(data: bytes) -> dict[int, list[int]]:
    """The quantisation tables by id."""
    tables, at = {}, 0
    while at < len(data):
        wide, number = data[at] >> 4, data[at] & 15
        values = data[at + 1 : at + (129 if wide else 65)]
        if len(values) == (128 if wide else 64):
            tables[number] = np.frombuffer(values, ">u2" if wide else "u1").tolist()
        at += 1 + len(values)
    return tables


def _of_png(chunks: Chunks) -> dict[str, float]:
    of = dict(reversed(chunks))
    head = of.get(b"IHDR", b"").ljust(13, b"\0")
    coded = [data for kind, data in chunks if kind == b"IDAT"]
    try:
        first = zlib.decompressobj().decompress(b"".join(coded[:2])[:65536], 1)
    except zlib.error as error:
        raise Rejected("PNG data cannot be read") from error
    return {
        "container": 1,
        "bytes": sum(12 + len(data) for kind, data in chunks if kind not in (b"IDAT", b"")),
        "parts": len(chunks) - len(coded),
        "order": code(*(kind for i, (kind, _) in enumerate(chunks) if not i or kind != chunks[i - 1][0])),
        "exif": b"eXIf" in of,
        "icc": b"iCCP" in of,
        "comment": bool({b"tEXt", b"iTXt", b"zTXt"} & of.keys()),
        "trailing": len(of.get(b"", b"")),
        "density": code(of.get(b"pHYs", b"")),
        "depth": head[8],
        "colour_type": head[9],
        "interlace": head[12],
        "zlib": coded[0][1] if coded and len(coded[0]) > 1 else -1,
        "filter": first[0] if first else -1,
        "palette": len(of.get(b"PLTE", b"")),
        "transparency": len(of[b"tRNS"]) if b"tRNS" in of else -1,
        "piece": len(coded[0]) if len(coded) > 1 else 0,
    }


def _of_webp(chunks: Chunks) -> dict[str, float]:
    kind, data = first_frame(chunks)
    of = dict(reversed(chunks))
    read = {} if kind == b"VP8L" else dict(enumerate(quantisers(data)))
    return {
        "container": 2,
        "bytes": sum(8 + len(data) for name, data in chunks if name not in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")),
        "parts": len(chunks),
        "order": code(*(name for name, _ in chunks[:50])),
        "exif": b"EXIF" in of,
        "icc": b"ICCP" in of,
        "transparency": b"ALPH" in of,
        "lossless": kind == b"VP8L",
        "quantiser": float(np.mean(list(read.values()))) if read else np.nan,
        "quantiser_spread": max(read.values()) - min(read.values()) if read else np.nan,
    }


def code(*values: object) -> float:
    """A number for what has no order; a tree tells numbers apart."""
    return float(zlib.crc32(repr(values).encode("utf-8", "surrogatepass")) % 65_521)

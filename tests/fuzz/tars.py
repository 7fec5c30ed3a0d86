"""Tars from their blocks up, by hypothesis: what writers made of the format in forty years, and what none should.

`tarfile` writes three of its dialects and no broken one, so headers are put together here. A made tar knows whether it
is sound: then it must be accepted, whatever its spelling.
"""

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st

BLOCK = 512
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)
SUFFIXES = ("jpg", "txt", "json", "JPEG", "cls", "seg.png", "")


class Made(NamedTuple):
    data: bytes
    sound: bool


def padded(content: bytes, filling: bytes = b"\0") -> bytes:
    return content + filling * (-len(content) % BLOCK)


def header(
    name: bytes,
    size: bytes,
    kind: bytes = b"0",
    magic: bytes = USTAR,
    owner: bytes = b"",
    prefix: bytes = b"",
    signed: bool = False,
) -> bytes:
    """A block with the size as spelled; an owner with high bytes and `signed` give the checksum of old tars."""
    out = bytearray(BLOCK)
    out[: min(len(name), 100)] = name[:100]
    out[100:124] = b"0000644\0" * 3
    out[124:136] = size
    out[136:148] = b"14000000000\0"
    out[156:157] = kind
    out[257:265] = magic
    out[265 : 265 + len(owner)] = owner
    out[345 : 345 + len(prefix)] = prefix
    out[148:156] = b" " * 8
    high = 256 * sum(byte > 127 for byte in out) if signed else 0
    out[148:156] = b"%06o\0 " % (sum(out) - high)
    return bytes(out)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def extended(kind: bytes, content: bytes, filling: bytes = b"\0") -> bytes:
    return header(b"././@LongLink", octal(len(content)), kind) + padded(content, filling)


def record(keyword: bytes, value: bytes) -> bytes:
    """A PAX record, whose length counts its own digits."""
    rest = b" %s=%s\n" % (keyword, value)
    length = len(rest) + len(str(len(rest)))
    length += len(str(length)) - len(str(len(rest)))
    return b"%d" % length + rest


SIZES: dict[str, Callable[[int], bytes]] = {
    "octal": octal,
    "with a blank": lambda n: b"%011o " % n,
    "twelve digits": lambda n: b"%012o" % n,
    "blanks before": lambda n: b"%11o\0" % n,
    "base 256": lambda n: b"\x80" + n.to_bytes(11, "big"),
}
# How a member is named: header blocks for (name, spelled size).
SPELLINGS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "ustar": lambda name, size: header(name, size),
    "prefix": lambda name, size: header(name.rpartition(b"/")[2], size, prefix=name.rpartition(b"/")[0]),
    "v7": lambda name, size: header(name, size, b"\0", V7),
    "gnu": lambda name, size: header(name, size, magic=GNU),
    "contiguous": lambda name, size: header(name, size, b"7"),
    "signed": lambda name, size: header(name, size, owner=b"\xe9\xff", signed=True),
    "gnu long": lambda name, size: extended(b"L", name + b"\0") + header(b"short", size, magic=GNU),
    "gnu long, no NUL": lambda name, size: extended(b"L", name) + header(b"short", size, magic=GNU),
    "pax": lambda name, size: extended(b"x", record(b"mtime", b"1.5") + record(b"path", name)) + header(b"short", size),
    "solaris": lambda name, size: extended(b"X", record(b"path", name)) + header(b"short", size),
    "two names": lambda name, size: (
        extended(b"L", name + b"\0") + extended(b"x", record(b"path", b"other")) + header(b"short", size)
    ),
    "pax without a name": lambda name, size: extended(b"x", record(b"comment", b"\xff=\n1")) + header(name, size),
    "long link": lambda name, size: extended(b"K", b"link\0") + header(name, size),
}
# Blocks between two samples that take no harm from any neighbour.
HARMLESS: dict[str, bytes] = {
    "directory": header(b"folder/", octal(0), b"5"),
    "directory with a size": header(b"folder", octal(4096), b"5"),
    "directory of V7": header(b"folder/", octal(0), b"\0", V7),
    "global header": extended(b"g", record(b"comment", b"hello")),
    "named directory": extended(b"x", record(b"path", b"folder/")) + header(b"f", octal(0), b"5"),
}
# Blocks that make a shard refused, each for its reason.
REFUSED: dict[str, tuple[str, bytes]] = {
    "link": ("a link", header(b"a.jpg", octal(0), b"2")),
    "hard link": ("a link", header(b"a.jpg", octal(0), b"1")),
    "device": ("a device", header(b"a.jpg", octal(0), b"3")),
    "fifo": ("a device", header(b"a.jpg", octal(0), b"6")),
    "unknown": ("no plain file", header(b"a.jpg", octal(0), b"Z")),
    "parted": (
        "repeats its key",
        b"".join(header(b"%d.%s" % name, octal(0)) for name in ((7, b"jpg"), (8, b"jpg"), (7, b"txt"))),
    ),
    "sparse, old": ("no plain file", header(b"a.jpg", octal(0), b"S", GNU)),
    "sparse, new": ("is sparse", extended(b"x", record(b"GNU.sparse.major", b"1")) + header(b"a.jpg", octal(0))),
    "size in PAX": ("restates its size", extended(b"x", record(b"size", b"512")) + header(b"a.jpg", octal(0))),
    "one name for all": ("names all", extended(b"g", record(b"path", b"x.jpg")) + header(b"a.jpg", octal(0))),
    "PAX length of 0": ("broken PAX", extended(b"x", b"0 path=a\n") + header(b"a.jpg", octal(0))),
    "PAX length beyond": ("broken PAX", extended(b"x", b"99 path=a\n") + header(b"a.jpg", octal(0))),
    "PAX length of a page": ("broken PAX", extended(b"x", b"9" * 500 + b" path=a\n") + header(b"a.jpg", octal(0))),
    "NUL in PAX": ("holds a NUL", extended(b"x", record(b"path", b"a.jpg\0.exe")) + header(b"a.jpg", octal(0))),
    "no name in PAX": ("is empty", extended(b"x", record(b"path", b"")) + header(b"a.jpg", octal(0))),
    "no long name": ("is empty", extended(b"L", b"") + header(b"a.jpg", octal(0))),
    "long name": ("longer than", extended(b"L", b"x" * 5000) + header(b"a.jpg", octal(0))),
    "very long name": ("longer than", extended(b"L", b"x" * 2**20) + header(b"a.jpg", octal(0))),
    "too long name": ("more than 1048576", extended(b"L", b"x" * (2**20 + 1)) + header(b"a.jpg", octal(0))),
    "name in the padding": ("in the padding", extended(b"L", b"a.jpg", b"x") + header(b"a.jpg", octal(0))),
    "record in the padding": (
        "in the padding",
        extended(b"x", record(b"path", b"a.jpg"), b"x") + header(b"a.jpg", octal(0)),
    ),
    "global in between": (
        "parts the one",
        extended(b"L", b"b.jpg\0") + extended(b"g", record(b"comment", b"c")) + header(b"a.jpg", octal(0)),
    ),
    "climbs": ("outside the shard", header(b"../a.jpg", octal(0))),
    "climbs inside": ("outside the shard", header(b"a/../../a.jpg", octal(0))),
    "climbs by PAX": ("outside the shard", extended(b"x", record(b"path", b"../a.jpg")) + header(b"a.jpg", octal(0))),
    "climbs by prefix": ("outside the shard", header(b"a.jpg", octal(0), prefix=b"..")),
    "absolute": ("outside the shard", header(b"/a.jpg", octal(0))),
    "is its folder": ("two dots", header(b"a/..", octal(0))),
    "is a pickle": ("executed", header(b"a.PKL", octal(0))),
    "two names": ("two names", header(b"a.jpg", octal(0), magic=GNU, prefix=b"12345670123")),
    "directory with content": ("half a directory", header(b"a/", octal(512), b"\0", V7)),
    "file with a slash": ("half a directory", header(b"a/", octal(0))),
    "file with a slash in PAX": ("half a directory", extended(b"x", record(b"path", b"a/")) + header(b"a", octal(0))),
    "directory with a file's name": (
        "half a directory",
        extended(b"L", b"a.jpg\0") + header(b"a/", octal(0), b"\0", V7),
    ),
    "half a terabyte": ("more than 134217728", header(b"a.jpg", b"7" * 11 + b"\0") + bytes(BLOCK)),
    "negative": ("broken tar header", header(b"a.jpg", b"\xff" * 12)),
    "signed size": ("broken tar header", header(b"a.jpg", b"-0000000010\0")),
    "NUL before the size": ("broken tar header", header(b"a.jpg", b"\x000000001000\0") + bytes(BLOCK)),
    "wrong checksum": ("broken tar header", header(b"a.jpg", octal(0)).replace(b"a.jpg", b"b.jpg")),
}
_names = st.text("ab-_ é\\{}'\"%$\udc80\t\n", max_size=9).map(lambda name: name.encode("utf-8", "surrogateescape"))
_folders = st.lists(st.sampled_from([b"f", b"a.b", b".", b"...", b"x" * 60]), max_size=3).map(lambda f: b"/".join(f))


@st.composite
def samples(draw: st.DrawFn, number: int) -> bytes:
    """The members of one sample, under a key of its own, in whatever order and spelling."""
    key = b"%s/%d%s" % (draw(_folders), number, draw(_names))
    blocks = b""
    for suffix in draw(st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=4, unique=True)):
        name = (key + b"." + suffix.encode() if suffix else key).lstrip(b"/")
        content = draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 1, 13, 30]))
        spelling = draw(st.sampled_from([s for s in SPELLINGS if len(name) < 100 or "long" in s or s == "pax"]))
        spelling = "pax" if spelling in ("long link", "prefix") and len(name) >= 100 else spelling
        size = SIZES[draw(st.sampled_from(list(SIZES)))](len(content))
        blocks += SPELLINGS[spelling](name, size) + padded(content, draw(st.sampled_from([b"\0", b"p"])))
    return blocks


@st.composite
def tars(draw: st.DrawFn) -> Made:
    blocks = [draw(samples(number)) for number in range(draw(st.integers(0, 4)))]
    for name in draw(st.lists(st.sampled_from(list(HARMLESS)), max_size=2)):
        blocks.insert(draw(st.integers(0, len(blocks))), HARMLESS[name])
    end, sound = draw(st.sampled_from([(1, True), (2, True), (20, True), (0, False), (1.5, False), (2.5, True)]))
    odd = draw(st.sampled_from([*[""] * 9, "refused", "behind the end", "twice"]))
    if odd == "refused":
        blocks.insert(draw(st.integers(0, len(blocks))), REFUSED[draw(st.sampled_from(sorted(REFUSED)))][1])
    if odd == "twice" and blocks:
        blocks.append(blocks[0])
    tail = bytes(int(BLOCK * end)) + (draw(st.binary(min_size=1)) + b"\1" if odd == "behind the end" else b"")
    return Made(b"".join(blocks) + tail, sound and not odd)

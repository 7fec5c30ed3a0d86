"""The columns that others write: LAION, DataComp, img2dataset, COYO, CC3M/CC12M under one set of names.

Names are matched in this order; the first that exists is used. Released files violate their own schema, so a value is
believed only where it has the column's type and range. Trade-off: nothing is repaired beyond what is exact (the text
"640" and the float 640.0 are the integer 640); the rest becomes null and is counted.

LAION's `hash` has no place here: it is mmh3 of url and text, and says nothing about the image.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np

from pipeline.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from publicsuffixlist import PublicSuffixList

IMAGE = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
CAPTION = ("txt", "caption", "text", "TEXT", "top_caption")
UID = ("uid",)
KEY = ("key", "__key__", "SAMPLE_ID", "id", "image_path")
LABEL = ("label", "class", "cls")

SNIFFED = 1024**2  # bytes that decide what a text file without header holds
URL_SHARE = 0.9  # of its lines; captions that are URLs occur, URLs that are captions do not
MAX_TEXT = 65_536  # bytes of one value; captions and URLs end far below
# Decoders and canvases commonly end at a signed 16-bit side. LAION-400M has rows that claim more, and that claim 0.
MAX_SIDE = 32_767


@dataclass(frozen=True)
class Column:
    """One canonical column: the names it goes by, its kind, and what a value must satisfy to be believed.

    `pattern` must match the whole text, which becomes lower case; numbers lie in [low, high]."""

    aliases: tuple[str, ...]
    kind: Literal["text", "integer", "number"] = "text"
    pattern: str = ""
    low: float = float("-inf")
    high: float = float("inf")


METADATA = {
    "uid": Column(UID, pattern="[0-9a-fA-F]{32}"),
    "key": Column(KEY),
    "url": Column(("url", "URL")),
    "caption": Column(CAPTION),
    # img2dataset's `width` is that of the stored image; what was published is the original's
    "width": Column(("original_width", "width", "WIDTH"), "integer", low=1, high=MAX_SIDE),
    "height": Column(("original_height", "height", "HEIGHT"), "integer", low=1, high=MAX_SIDE),
    # cosines of CLIP embeddings in every release; B/32 first, because that is LAION's
    "similarity": Column(
        (
            "similarity",
            "clip_b32_similarity_score",
            "clip_similarity_vitb32",
            "clip_l14_similarity_score",
            "clip_similarity_vitl14",
        ),
        "number",
        low=-1,
        high=1,
    ),
    "language": Column(("language", "LANGUAGE")),
    "nsfw": Column(("nsfw", "NSFW")),
    "watermark": Column(("pwatermark", "watermark_score"), "number", low=0, high=1),
    "unsafe": Column(("punsafe", "nsfw_score_opennsfw2"), "number", low=0, high=1),
    "aesthetic": Column(("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"), "number"),
    "phash": Column(("phash", "image_phash"), pattern="[0-9a-fA-F]{16}"),
    "sha256": Column(("sha256",), pattern="[0-9a-fA-F]{64}"),
    "md5": Column(("md5",), pattern="[0-9a-fA-F]{32}"),
    "status": Column(("status",)),
}


def said(meta: Mapping[str, Any], name: str) -> str:
    """What a sample's json or row says under a canonical text column; empty unless it can be believed."""
    spec = METADATA[name]
    value = meta.get(column(list(meta), spec.aliases) or "")
    if not isinstance(value, str) or len(value) > MAX_TEXT or (spec.pattern and not re.fullmatch(spec.pattern, value)):
        return ""
    text = value.encode("utf-8", "replace").decode()  # json can spell lone surrogates
    return text.lower() if spec.pattern else text


def column(names: list[str], aliases: tuple[str, ...]) -> str | None:
    """The first alias that is among `names`."""
    return next((a for a in aliases if a in names), None)


# The columns by which a published row may be found from a stored sample, the most trustworthy first
JOINS = {
    "uid": METADATA["uid"].aliases,
    "key": (
        "key",
        "__key__",
        "image_path",
    ),  # the downloader's; LAION's SAMPLE_ID and COYO's id name no sample of a tar
    "url": METADATA["url"].aliases,
}


@dataclass(frozen=True)
class TextLayout:
    """The columns of a tsv or csv file in order, and whether its first line names them."""

    names: list[str]
    header: bool
    delimiter: str


def text_layout(path: str, head: bytes) -> TextLayout:
    """The layout of a text file, by the first SNIFFED bytes of it.

    CC3M and CC12M have no header and opposite orders, so the URLs decide. Raises InputError where they cannot.
    """
    delimiter = "," if path.endswith(".csv") else "\t"
    text = io.StringIO(head.decode("utf-8-sig", errors="replace"), newline="")
    quoted: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = [row for row in csv.reader(text, delimiter=delimiter, quoting=quoted) if row]
    if len(head) == SNIFFED:
        del rows[-1:]  # cut in the middle
    if not rows:
        raise InputError(f"{path}: is empty or one endless line; fetch it again")
    if column(rows[0], METADATA["url"].aliases) or column(rows[0], UID):
        return TextLayout(rows[0], True, delimiter)
    shares = [
        sum(len(row) > field and row[field].startswith(("http://", "https://")) for row in rows) / len(rows)
        for field in range(len(rows[0]))
    ]
    urls = [field for field, share in enumerate(shares) if share >= URL_SHARE]
    if len(urls) != 1 or urls[0] > 1 or len(shares) < 2:
        raise InputError(f"{path}: no header, and not exactly one of the first two fields holds URLs; add a header")
    names = [f"field {number}" for number in range(1, len(shares) + 1)]
    names[urls[0]], names[1 - urls[0]] = "url", "caption"
    return TextLayout(names, False, delimiter)


def canonical_names(path: str, names: list[str]) -> dict[str, str]:
    """Canonical column -> which of a file's columns holds it. Raises InputError where none or two do."""
    known = {name: found for name, spec in METADATA.items() if (found := column(names, spec.aliases))}
    if not known:
        raise InputError(f"{path}: not image-text metadata; its columns are {', '.join(names)[:500]}")
    if twice := [found for found in known.values() if names.count(found) > 1]:
        raise InputError(f"{path}: column {twice[0]!r} occurs twice; rename one")
    return known


def own_names(names: dict[str, str], only: Sequence[str]) -> list[str]:
    """The file's columns behind the canonical ones; a uid that is derived needs url and caption."""
    derived = ("url", "caption") if "uid" in only and "uid" not in names else ()
    return list(dict.fromkeys(names[name] for name in (*only, *derived) if name in names))


def canonical(batch: "pa.RecordBatch", names: dict[str, str], only: Sequence[str]) -> tuple["pa.Table", dict[str, int]]:
    """The columns `only` of a batch of a file's own columns, and what became null, by "column: reason".

    `names` is what `canonical_names` gave; uids are derived where the file has none."""
    import pyarrow as pa

    columns: dict[str, pa.Array] = {}
    invalid: dict[str, int] = {}
    for name, spec in METADATA.items():
        if names.get(name) in batch.schema.names:
            columns[name], reasons = believed(batch.column(names[name]), spec)
            invalid |= {f"{name}: {reason}": n for reason, n in sorted(reasons.items())}
    if "uid" in only and "uid" not in names and "url" in names:
        columns["uid"] = _derived(columns["url"], columns.get("caption"))
    return pa.table({name: columns[name] for name in METADATA if name in columns and name in only}), invalid


def _derived(urls: "pa.Array", captions: "pa.Array | None") -> "pa.Array":
    import pyarrow as pa

    texts = captions.to_pylist() if captions is not None else [None] * len(urls)
    pairs = zip(urls.to_pylist(), texts, strict=True)
    return pa.array([uid_of_row(url, text) if url else None for url, text in pairs], pa.string())


def uid_of_row(url: str, text: str | None) -> str:
    """The uid of a row that has none: 128 bits of sha256 over url and text, as hex."""
    return hashlib.sha256(f"{url}\0{text or ''}".encode()).hexdigest()[:32]


def believed(values: "pa.Array", spec: Column) -> tuple["pa.Array", Counter[str]]:
    """The values that satisfy `spec`, null elsewhere, and how many are null for which reason.

    Any arrow array becomes string[n], int32[n] or float32[n]. A null of the source is counted too ("null")."""
    return _text(values, spec) if spec.kind == "text" else _numbers(values, spec)


def lengths(values: "pa.Array") -> np.ndarray:
    """Bytes of each text, int64[n]; 0 for nulls and for what is no text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type) and len(values.dictionary):
        return lengths(values.dictionary)[values.indices.fill_null(0).to_numpy()] * values.is_valid().to_numpy(False)
    if not _is_text(values.type):
        return np.zeros(len(values), np.int64)
    return pc.binary_length(values).fill_null(0).to_numpy().astype(np.int64)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in checks)


def _text(values: "pa.Array", spec: Column) -> tuple["pa.Array", Counter[str]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    reasons = Counter({"null": values.null_count})
    values, reasons["too long"] = _spelled_out(values)
    if not _is_text(values.type):
        values, reasons["wrong type"] = _digits(values)
    values, reasons["not UTF-8"] = _utf8(values)
    if spec.pattern:
        fits = pc.match_substring_regex(values, f"^(?:{spec.pattern})$")
        reasons["malformed"] = pc.sum(pc.invert(fits)).as_py() or 0
        values = pc.utf8_lower(pc.if_else(fits, values, pa.scalar(None, pa.string())))
    return values, +reasons


def _spelled_out(values: "pa.Array") -> tuple["pa.Array", int]:
    """A dictionary array as plain values; texts above MAX_TEXT are null before they are spelled out."""
    import pyarrow as pa

    long = lengths(values) > MAX_TEXT
    if pa.types.is_dictionary(values.type):
        source, rows = values.dictionary, values.indices.fill_null(0).to_numpy()
    elif long.any():
        source, rows = values, np.arange(len(values))
    else:
        return values, 0
    return source.take(pa.array(rows, mask=long | values.is_null().to_numpy(False))), int(long.sum())


def _digits(values: "pa.Array") -> tuple["pa.Array", int]:
    """Whole numbers as text (LAION's SAMPLE_ID and COYO's id are keys), null for whatever else is no text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(values.type):  # float64 keys, made by tools that have no nullable integers
        whole = pc.and_(pc.is_finite(values), pc.equal(pc.floor(values), values))
        exact = pc.and_(whole, pc.less(pc.abs(values), 2.0**53))
        texts = pc.if_else(exact, values, None).cast(pa.int64()).cast(pa.string())
    elif pa.types.is_integer(values.type):
        texts = values.cast(pa.string())
    else:
        texts = pa.nulls(len(values), pa.string())
    return texts, texts.null_count - values.null_count


def _utf8(values: "pa.Array") -> tuple["pa.Array", int]:
    import pyarrow as pa

    raw = values.cast(pa.binary())
    try:
        return raw.cast(pa.string()), 0  # validates
    except pa.ArrowInvalid:
        texts = [_decoded(value) for value in raw.to_pylist()]
        return pa.array(texts, pa.string()), texts.count(None) - raw.null_count


def _decoded(value: bytes | None) -> str | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return None


def _numbers(values: "pa.Array", spec: Column) -> tuple["pa.Array", Counter[str]]:
    import polars as pl
    import pyarrow as pa

    given = values.is_valid().to_numpy(False)
    reasons = Counter({"null": values.null_count})
    if _is_text(values.type) or pa.types.is_dictionary(values.type):
        values = _utf8(_spelled_out(values)[0])[0]
    numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)
    if not numeric and not pa.types.is_string(values.type):
        values = pa.nulls(len(values), pa.float32())
    parsed = pl.Series(pl.from_arrow(values)).cast(pl.Float64, strict=False)
    numbers = parsed.fill_null(np.nan).to_numpy().copy()
    with np.errstate(over="ignore"):
        checks = {
            "wrong type": parsed.is_null().to_numpy(),
            "not a number": ~np.isfinite(numbers.astype(np.float32)),
            "not an integer": (np.floor(numbers) != numbers) & (spec.kind == "integer"),
            "out of range": ~((numbers >= spec.low) & (numbers <= spec.high)),
        }
    good = given.copy()
    for reason, bad in checks.items():
        reasons[reason] = int((good & bad).sum())
        good &= ~bad
    kind = np.int32 if spec.kind == "integer" else np.float32
    return pa.array(np.where(good, numbers, 0).astype(kind), mask=~good), +reasons


@lru_cache(maxsize=65_536)
def domain(url: str) -> str:
    """The registrable domain of a URL: whoever owns it decides what all its hosts serve. Empty where there is none.

    By the bundled public suffix list with its private part, so that `someone.blogspot.com` is a domain of its own: it
    can be abandoned and taken like one. An IP address, or a name without a known suffix, stands for itself.
    """
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
    is_address = ":" in host or host.replace(".", "").isdecimal()
    return host if is_address else _suffixes().privatesuffix(host) or host


@cache
def _suffixes() -> "PublicSuffixList":
    from publicsuffixlist import PublicSuffixList

    return PublicSuffixList()

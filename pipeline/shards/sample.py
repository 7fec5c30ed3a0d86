"""A sample: one image-text pair as its raw parts, decoded only when someone asks."""

import dataclasses
import hashlib
import io
import json
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.tables import CAPTION

UidRule = Literal["key", "shard/key"]
MAX_JSON_BYTES = 4 * 1024**2  # parsed, a byte may become twenty
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
Bytes = bytes | memoryview
_UID = re.compile("[0-9a-fA-F]{32}")
_decode = json.JSONDecoder().raw_decode


class Rejected(ValueError):
    """One bad sample (undecodable, too large, no caption): counted and reported, never fatal."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`parts` maps suffix to bytes (`jpg`, `txt`, `json`); `row` holds the other columns of a parquet row."""

    key: str
    uid: str
    parts: Mapping[str, Bytes]
    row: Mapping[str, Any] | None = None

    @property
    def image_suffix(self) -> str:
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.parts:
                return suffix
        raise Rejected("no image (jpg, jpeg, png or webp)")

    @property
    def image(self) -> bytes:
        """The image as stored, still encoded."""
        return bytes(self.parts[self.image_suffix])

    @property
    def caption(self) -> str:
        """The caption, from the txt part or else from the json.

        Raises Rejected when there is none or it is not UTF-8."""
        if "txt" in self.parts:
            try:
                text = bytes(self.parts["txt"]).decode("utf-8")
            except UnicodeDecodeError as error:
                raise Rejected("caption is not UTF-8") from error
        else:
            meta = self.meta
            found = next((meta[k] for k in CAPTION if meta.get(k)), "")
            if isinstance(found, list | dict):
                raise Rejected("caption is no text")
            text = str(found)
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise Rejected("caption is not UTF-8")  # a lone surrogate, which json can spell
        if not text.strip():
            raise Rejected("empty caption")
        return text

    @property
    def meta(self) -> Mapping[str, Any]:
        """The json part, or the other columns of the parquet row."""
        if self.row is not None:
            return self.row
        return _json(self.parts["json"]) if "json" in self.parts else {}

    def changed(self, image: bytes | None = None, caption: str | None = None) -> "Sample":
        """A copy with another image (same format) or caption.

        img2dataset repeats the caption in its json, and notes the image's size and maybe its hash there. What was true
        of the pair is made true of its copy: the mismatch would give the poison away. Raises Rejected where that json
        cannot be written again.
        """
        parts, row, meta = dict(self.parts), self.row, self.meta
        said: dict[str, Any] = {}
        if caption is not None:
            old = next((meta[name] for name in CAPTION if meta.get(name)), None)
            said |= dict.fromkeys((name for name in CAPTION if name in meta and meta[name] == old), caption)
            parts |= {"txt": caption.encode()} if "txt" in parts else {}
        if image is not None:
            for name in ("sha256", "md5"):
                if name in meta and meta[name] == hashlib.new(name, self.image, usedforsecurity=False).hexdigest():
                    said[name] = hashlib.new(name, image, usedforsecurity=False).hexdigest()
            said |= _new_sizes(meta, self.image, image)
            parts[self.image_suffix] = image
        if said and row is not None:
            row = ChainMap(said, dict(row))
        elif said:
            parts["json"] = _with(self.parts["json"], meta, said)
        return dataclasses.replace(self, parts=parts, row=row)


@dataclass
class Counts:
    """What happened to the samples of one shard: `read = out + dropped + failed`, checked before the marker is written.

    The sha256 are those of the manifests. `reasons` counts why samples failed or were dropped; `facts` is whatever
    else a job wants in the marker.
    """

    read: int = 0
    out: int = 0
    dropped: int = 0
    failed: int = 0
    changed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    input_sha256: str = ""
    output: str = ""
    output_sha256: str = ""
    output_bytes: int = 0
    dropped_sha256: str = ""
    dropped_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def uid_of(key: str, shard_name: str, published: object, rule: UidRule) -> str:
    """128-bit hex: DataComp's `uid` where the sample carries one, else the start of sha256 over the key.

    The key alone survives resharding; where keys repeat from shard to shard, `shard/key` tells them apart.
    """
    if isinstance(published, str) and _UID.fullmatch(published):
        return published.lower()
    name = key if rule == "key" else f"{shard_name}/{key}"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def published_uid(parts: Mapping[str, Bytes]) -> object:
    """The `uid` field of a json part; the parse is skipped where the bytes do not mention one."""
    blob = parts.get("json")
    if blob is None or b'"uid"' not in bytes(blob):
        return None
    return _json(blob).get("uid")


def check_unique(uids: list[str], where: str) -> None:
    """Nothing is joined by position, so a uid must name one sample."""
    if len(set(uids)) != len(uids):
        seen: set[str] = set()
        for twice in uids:
            if twice in seen:
                break
            seen.add(twice)
        raise InputError(
            f"{where}: uid {twice} occurs more than once, as samples {uids.index(twice):,} and "
            f"{uids.index(twice, uids.index(twice) + 1):,} (from 0); uids that samples carry, or else their keys, must "
            "be unique (where keys repeat per shard: --uid shard/key)"
        )


def _new_sizes(meta: Mapping[str, Any], before: Bytes, after: Bytes) -> dict[str, int]:
    """Where the metadata has the stored image's width and height, those of the new one."""
    from PIL import Image

    if not {"width", "height"} <= meta.keys():
        return {}
    try:
        was, now = (Image.open(io.BytesIO(data)).size for data in (before, after))
    except Exception:  # Pillow's readers raise what they like; whoever decodes it will say so
        return {}
    return dict(zip(("width", "height"), now, strict=True)) if was == (meta["width"], meta["height"]) else {}


def _with(blob: Bytes, meta: Mapping[str, Any], values: Mapping[str, Any]) -> bytes:
    """A json object with other values of some keys, written as it was where that is possible."""
    text = str(blob, "utf-8")
    for name, value in values.items():
        spelled = json.dumps(value, ensure_ascii=text.isascii())
        member = re.compile(rf'("{re.escape(name)}"\s*:\s*)("(?:[^"\\]|\\.)*"|null|-?\d+)(?![\d.eE])')
        text = member.sub(lambda found, to=spelled: found[1] + to, text, count=1)  # type: ignore[misc]
    wanted = {**meta, **values}
    try:
        if json.dumps(_json(text.encode())) != json.dumps(wanted):
            indent, plain = re.search(r'\n( +)"', text), text.isascii()
            colon, comma = ": " if '": ' in text else ":", "," if indent or '": ' not in text else ", "
            text = json.dumps(wanted, ensure_ascii=plain, indent=indent and len(indent[1]), separators=(comma, colon))
    except RecursionError as error:  # a parser goes deeper than a writer
        raise Rejected("json is nested too deeply") from error
    return text.encode("utf-8", "surrogatepass")


def _json(blob: Bytes) -> dict[str, Any]:
    """Empty where the blob is no object, or too large to be anybody's metadata."""
    if len(blob) > MAX_JSON_BYTES:
        return {}
    try:
        text = str(blob, "utf-8").strip()
        value, end = _decode(text)  # half the time of `loads`, and a uid is looked up in every sample
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and end == len(text) else {}

"""What can be told of a pair without looking at what it shows: container, tables, sizes, its json, its words' form.

Trade-off: headers are read, and one small decode gives the colours; nothing here knows how a file came about.
"""

import hashlib
import io
import re

import numpy as np
from PIL import Image

from pipeline.shards import Rejected, Sample, encoding
from pipeline.shards.image import decode
from pipeline.shards.sample import MAX_JSON_BYTES
from pipeline.tables import CAPTION, said

NEAR = 64  # pixels to which an image is decoded for its mean colour

IMAGE_FACTS = {
    "header": "container whole bytes parts order exif icc comment trailing components tables luma chroma luma_dc "
    "sampling progressive jfif density adobe restart huffman_standard huffman_tables colour_type depth interlace "
    "zlib filter palette transparency piece lossless quantiser quantiser_spread",
    "size": "bytes bytes_per_pixel width height pixels",
    "colour": "red green blue spread",
}
TEXT_FACTS = {
    "caption": "characters words upper capital full_stop not_ascii digits",
    "json": "there indent compact_commas compact_colons escaped newline keys order members agrees hash_agrees "
    "size_agrees",
}
NAMES = [f"{family}.{fact}" for family, facts in (IMAGE_FACTS | TEXT_FACTS).items() for fact in facts.split()]


def facts(sample: Sample) -> dict[str, float]:
    """What can be said of a pair's encoding, by NAMES; missing where it does not apply or cannot be read."""
    found = {
        "json.members": encoding.code(*("image" if p in ("jpg", "jpeg", "png", "webp") else p for p in sample.parts))
    }
    for prefix, read in (("caption.", _of_caption), ("json.", _of_json)):
        try:
            found |= {prefix + name: value for name, value in read(sample).items()}
        except Rejected:
            continue
    try:
        data = sample.image
    except Rejected:
        return found
    found["size.bytes"] = len(data)
    try:
        found |= {"header." + name: value for name, value in encoding.facts(data).items()}
        found["header.whole"] = 1
        small = decode(data, near=NEAR)
        colours = np.asarray(small).reshape(-1, 3)
        found |= {f"colour.{n}": float(v) for n, v in zip(("red", "green", "blue"), colours.mean(0), strict=True)}
        found["colour.spread"] = float(colours.std())
        width, height = size_of(data)
        found |= {"size.width": width, "size.height": height, "size.pixels": width * height}
        found["size.bytes_per_pixel"] = len(data) / (width * height)
        if {"width", "height"} <= (meta := sample.meta).keys():
            found["json.size_agrees"] = (meta["width"], meta["height"]) == (width, height)
    except Rejected:
        found["header.whole"] = 0
    return found


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of an image that has been decoded before."""
    return Image.open(io.BytesIO(data)).size


def _of_caption(sample: Sample) -> dict[str, float]:
    text = sample.caption
    share = 1 / len(text)
    return {
        "characters": len(text),
        "words": len(text.split()),
        "upper": share * sum(c.isupper() for c in text),
        "capital": text[0].isupper(),
        "full_stop": text.rstrip().endswith("."),
        "not_ascii": share * sum(not c.isascii() for c in text),
        "digits": share * sum(c.isdigit() for c in text),
    }


def _of_json(sample: Sample) -> dict[str, float]:
    """The layout, not the length: that is the caption's."""
    meta = sample.meta
    repeated = [meta[name] for name in CAPTION if isinstance(meta.get(name), str)]
    found: dict[str, float] = {"there": bool(meta), "keys": len(meta), "order": encoding.code(*meta)}
    if repeated:
        found["agrees"] = all(text == sample.caption for text in repeated)
    if published := said(meta, "sha256"):  # img2dataset's, of the image as it was downloaded
        found["hash_agrees"] = published == hashlib.sha256(sample.image).hexdigest()
    if "json" not in sample.parts:
        return found
    blob = bytes(sample.parts["json"])[:MAX_JSON_BYTES]
    spaces = re.search(rb"\n( *)\S", blob)
    return found | {
        "indent": len(spaces[1]) if spaces else -1,
        "compact_commas": b'","' in blob or b',"' in blob,
        "compact_colons": b'":"' in blob or re.search(rb'":[^ ]', blob) is not None,
        "escaped": (rb"\u" in blob) - (not blob.isascii()),
        "newline": blob.endswith(b"\n"),
    }

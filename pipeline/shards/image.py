"""Images at the border: bounded before they are decoded, encoded again as they came.

What an edit did not touch should not show in the encoding either. So the pixels alone are encoded anew, with the
settings that the original states (JPEG tables, subsampling, progressive scans, Huffman coding; PNG mode and depth) or
that its bytes let estimate (PNG level, WebP quality). Everything else (EXIF, ICC, density, comments, in their order)
is the original's, byte for byte. Pixels that did not change keep what was stored: alpha, ink, 16 bits.

Not kept, because Pillow's encoders cannot: arithmetic coding, other scan scripts than libjpeg's, YCCK (becomes CMYK),
sampling other than 4:4:4, 4:2:2 and 4:2:0 (becomes the one with as many chroma samples), interlaced PNG, 16-bit PNG in
colour (becomes 8), the frames of an animation after the first. A JPEG with optimised tables that takes more than two
bytes a pixel is rejected. Kept though it may tell: a thumbnail within the EXIF shows the original, and the EXIF of an
image of another size its size.
"""

import io
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image, ImageChops, JpegImagePlugin

from pipeline.shards import encoding
from pipeline.shards.encoding import ADOBE, DHT, DQT, DRI, FRAMES
from pipeline.shards.sample import Rejected, Sample

MAX_PIXELS = 64_000_000
REMEMBERED = 65_536  # frames whose quality is known
TRIED_PIXELS = 1_000_000  # that settings are tried out on; also the rows that are converted at once
DEFAULT_LEVEL, DEFAULT_QUALITY = 6, 75
# What a zlib header says of the level, and the levels that say so; the first is the one to guess
_LEVELS = ((1, 0), (3, 2, 4, 5), (6,), (9, 7, 8))
_FORMATS = ("JPEG", "PNG", "WEBP")
_PNG_OURS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"hIST", b"IEND")


def decode(data: bytes, near: int | None = None) -> Image.Image:
    """RGB image, at least `near` pixels on the shorter side where a JPEG can be decoded smaller for free.

    Raises Rejected for what is not a whole JPEG, PNG or WebP, or has more than 64 million pixels (read off the header).
    Transparent pixels lie on white; an animation gives its first frame; of 16 bits the upper 8 count.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Rejected(f"image has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        if near:
            image.draft("RGB", (near, near))
        return _shown(image)
    except Rejected:
        raise
    except Exception as error:  # a decoder meets hostile bytes here; whatever it raises, the sample is bad
        raise Rejected(f"image cannot be decoded ({type(error).__name__})") from error


def _shown(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):  # Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def encode(image: Image.Image, like: bytes) -> bytes:
    """Encode RGB as `like` is: container, settings, mode and everything beside the pixels.

    The picture is that of `image` up to what the mode can hold: grey, the number of colours of a palette. Alpha stays
    where the new colour can be seen through it. Raises Rejected where the original's tables cannot be written again.
    """
    try:
        original = Image.open(io.BytesIO(like), formats=_FORMATS)
        if original.width * original.height > MAX_PIXELS:
            raise Rejected(f"more than {MAX_PIXELS} pixels")
        stored = _stored(image, original)
        if isinstance(original, JpegImagePlugin.JpegImageFile):
            made, joined = _jpeg(stored, original, like)
        elif original.format == "WEBP":
            made, joined = _webp(stored, original, like)
        else:
            made, joined = _png(stored, original, like)
    except Exception as error:  # the original is as hostile here as in `decode`
        raise Rejected(f"image cannot be encoded as it came ({type(error).__name__}: {error})") from error
    return joined if _same_picture(made, joined) else made


def _same_picture(made: bytes, joined: bytes) -> bool:
    """Whether the original's segments left the picture alone; those of a hostile one may define it anew."""
    try:
        one, other = decode(made), decode(joined)
    except Rejected:
        return False
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


# Pixels: from RGB to the mode of the original


def _stored(image: Image.Image, original: Image.Image) -> Image.Image:
    """`image` in the mode of the original, where what did not change keeps its values."""
    original.load()
    if original.mode in ("P", "PA"):
        return _with_palette(image, original)
    if original.mode == "RGB" and "transparency" not in original.info:
        return _bare(image)
    out = Image.new(original.mode, image.size)
    alike = image.size == original.size
    for box in _bands(image.size):
        new, old = _bare(image.crop(box)), original.crop(box)
        out.paste(_changed(new, old, alike), box[:2])
    return out


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, TRIED_PIXELS // size[0])
    for top in range(0, size[1], rows):
        yield 0, top, size[0], min(size[1], top + rows)


def _bare(image: Image.Image) -> Image.Image:
    """A copy without what Pillow would write along, such as another image's comment."""
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    image.info = {}
    return image


def _changed(new: Image.Image, old: Image.Image, alike: bool) -> Image.Image:
    """`new` (RGB) in the mode of `old`; where the two show the same, `old`."""
    values = np.asarray(old)
    made = _in_mode(new, old, values[..., -1] if alike and values.ndim == 3 else None)
    if alike:
        same = (np.asarray(new) == np.asarray(_shown(old))).all(2)
        made = np.where(same if made.ndim == 2 else same[..., None], values, made)
    return Image.frombytes(old.mode, new.size, _raw(made, old.mode))


def _in_mode(new: Image.Image, old: Image.Image, last: np.ndarray | None) -> np.ndarray:
    """The values of `new` in the mode of `old`; `last` is the original's alpha or black ink, if it is to stay."""
    kind, key = old.mode, old.info.get("transparency")
    if kind == "1":
        return np.asarray(new.convert("1"))
    if kind.startswith("I"):
        return np.asarray(new.convert("L")).astype(np.asarray(old).dtype) * 257
    if kind == "L":
        grey = np.asarray(new.convert("L"))
        return grey if key is None else np.where(grey == key, grey ^ 1, grey)  # this grey stands for transparent
    if kind == "RGB":
        colour = np.asarray(new).copy()
        colour[(colour == np.asarray(key if isinstance(key, tuple) else (-1, -1, -1))).all(2), 2] ^= 1
        return colour
    if kind == "CMYK":
        return _under_black(np.asarray(new), last)
    return _over_white(np.asarray(new.convert("L"))[..., None] if kind == "LA" else np.asarray(new), last)


def _over_white(colour: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Ink and alpha that show `colour` on white; an alpha that is too thin for it grows."""
    alpha = np.maximum(255 if alpha is None else alpha, 255 - colour.min(2))
    return np.concatenate([255 - _share(255 - colour, alpha), alpha[..., None]], axis=2).astype(np.uint8)


def _under_black(colour: np.ndarray, black: np.ndarray | None) -> np.ndarray:
    """The four inks that show `colour`; a black that would darken it shrinks."""
    light = np.maximum(255 - (0 if black is None else black), colour.max(2))
    return np.concatenate([255 - _share(colour, light), 255 - light[..., None]], axis=2).astype(np.uint8)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """uint8 [h, w, c]: 255 times part [h, w, c] of whole [h, w]."""
    shares = np.rint(part.astype(np.float32) * 255 / np.maximum(whole, 1).astype(np.float32)[..., None])
    return shares.clip(0, 255).astype(np.uint8)


def _raw(values: np.ndarray, kind: str) -> bytes:
    return np.packbits(values.astype(bool), axis=1).tobytes() if kind == "1" else np.ascontiguousarray(values).tobytes()


def _with_palette(image: Image.Image, original: Image.Image) -> Image.Image:
    """As many colours as the original has, chosen anew: one more or less would show."""
    size = len(original.getpalette() or [0, 0, 0]) // 3
    if image.size == original.size and ImageChops.difference(_bare(image), _shown(original)).getbbox() is None:
        return original.copy()
    if "transparency" in original.info or original.mode == "PA":
        clear = original.convert("RGBA")
        clear.info = {}
        out = _stored(image, clear).quantize(size, method=Image.Quantize.FASTOCTREE)
        alphas = (out.getpalette("RGBA") or [])[3::4]
        out = out.remap_palette(sorted(range(len(alphas)), key=alphas.__getitem__))  # the opaque end need not be stored
    else:
        out = _bare(image).quantize(size, dither=Image.Dither.NONE)
    out.info = {}
    return out


# Containers: (as Pillow writes it, with everything of the original's beside the pixels)


def _jpeg(image: Image.Image, original: JpegImagePlugin.JpegImageFile, like: bytes) -> tuple[bytes, bytes]:
    parts = encoding.jpeg_parts(like)
    marker, components = encoding.frame(parts)
    options: dict[str, Any] = {"qtables": _tables(original, components), "progressive": marker in encoding.PROGRESSIVE}
    options["optimize"] = not encoding.has_standard_huffman(parts)
    options["restart_marker_blocks"] = encoding.restart_interval(parts)
    options["subsampling"] = _sampling([sampling for _, sampling, _ in components])
    if len(components) == 3 and not encoding.is_jfif(parts):  # libjpeg's rule for what the components are
        transform = encoding.adobe_transform(parts)
        ids = bytes(number for number, _, _ in components)
        options["keep_rgb"] = ids == b"RGB" if transform is None else transform == 0
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue(), _join_jpeg(parts, encoding.jpeg_parts(out.getvalue()))


def _sampling(factors: list[int]) -> int:
    """4:4:4, 4:2:2 or 4:2:0 as Pillow numbers them, by the samples of the first component for one of the second."""
    first, second = ((f >> 4) * (f & 15) or 1 for f in (factors[0], (*factors, 0x11)[1]))
    return min((first // second).bit_length() - 1, 2) if first > second else 0


def _tables(original: JpegImagePlugin.JpegImageFile, components: list[tuple[int, int, int]]) -> list[list[int]]:
    """A table for each component, up to the last that differs: Pillow gives the rest the last."""
    used = [number for _, _, number in components]
    while len(used) > 1 and used[-1] == used[-2]:
        used.pop()
    return [list(original.quantization[number]) for number in used]


def _join_jpeg(old: encoding.Parts, new: encoding.Parts) -> bytes:
    """The header of `old` with frame, Huffman tables and restart interval of `new`; from the first scan on, `new`."""
    fresh = encoding.header(new)
    same_tables = [c[2] for c in encoding.frame(old)[1]] == [c[2] for c in encoding.frame(new)[1]]
    kept = {DQT} if same_tables else set()
    kept |= {DHT} if encoding.huffman_tables(old) == encoding.huffman_tables(new) else set()
    replaced = [{DQT}, {DHT}, {DRI}, FRAMES]
    if (encoding.adobe_transform(old) or 1) != (encoding.adobe_transform(new) or 1):
        replaced.append({ADOBE})
    replaced = [kinds for kinds in replaced if not kinds & kept]
    out = []
    for marker, part in encoding.header(old):
        kinds = next((kinds for kinds in replaced if marker in kinds), None)
        if kinds is None:
            out.append(part)
        else:  # all that `new` has of it, where `old` has the first
            out += [p for m, p in fresh if m in kinds]
            fresh = [(m, p) for m, p in fresh if m not in kinds]
    out += [p for m, p in fresh if any(m in kinds for kinds in replaced)]
    return b"".join(out + [part for _, part in new[len(encoding.header(new)) :]])


def _png(image: Image.Image, original: Image.Image, like: bytes) -> tuple[bytes, bytes]:
    old = encoding.png_chunks(like)
    depth, coded = old[0][1][8], [data for kind, data in old if kind == b"IDAT"]
    options: dict[str, Any] = {"bits": depth} if image.mode in ("P", "L") and depth < 8 else {}
    if image.mode == "P":
        palette = image.getpalette("RGBA") or []
        full = palette + [0, 0, 0, 255] * ((1 << depth) - len(palette) // 4)
        image.putpalette(full, "RGBA")  # Pillow chooses the depth by the number of colours
    if "transparency" in original.info and image.mode in ("L", "RGB", "1"):
        options["transparency"] = original.info["transparency"]

    def save(level: int, what: Image.Image = image) -> bytes:
        out = io.BytesIO()
        what.save(out, "PNG", compress_level=level, **options)
        return out.getvalue()

    levels = _LEVELS[coded[0][1] >> 6] if coded and len(coded[0]) > 1 else (DEFAULT_LEVEL,)
    if len(levels) > 1 and original.width * original.height <= TRIED_PIXELS:
        levels = (min(levels, key=lambda level: abs(len(save(level, original)) - len(like))),)
    made = save(levels[0])
    return made, encoding.write_png(_join_png(old, encoding.png_chunks(made)))


def _join_png(old: encoding.Chunks, new: encoding.Chunks) -> encoding.Chunks:
    """The chunks of `old` with header, palette, transparency and data of `new`; data in pieces as `old` has them."""
    had, fresh = dict(reversed(old)), dict(reversed(new))
    data = b"".join(data for kind, data in new if kind == b"IDAT")
    pieces = [len(d) for kind, d in old if kind == b"IDAT"]
    step = max(pieces[0], 1024) if len(pieces) > 1 else max(len(data), 1)
    ours = {b"IDAT": [data[i : i + step] for i in range(0, len(data), step)], b"IHDR": [fresh[b"IHDR"]], b"IEND": [b""]}
    for kind in (b"PLTE", b"tRNS"):
        if kind in fresh and kind in had:
            needed = fresh[kind].rstrip(b"\xff") if kind == b"tRNS" else b""
            ours[kind] = [fresh[kind][: max(len(had[kind]), len(needed))] if fresh[b"IHDR"][9] == 3 else fresh[kind]]
    out: encoding.Chunks = []
    for kind, part in old:
        if kind in _PNG_OURS:
            out += [(kind, d) for d in ours.pop(kind, [])]
        else:
            out.append((kind, part))
    return out


def _webp(image: Image.Image, original: Image.Image, like: bytes) -> tuple[bytes, bytes]:
    old = encoding.webp_chunks(like)
    kind, data = encoding.first_frame(old)
    options: dict[str, Any] = {"lossless": kind == b"VP8L", "exact": True, "method": 4}
    options["quality"] = 80 if kind == b"VP8L" else webp_quality(original, data)
    out = io.BytesIO()
    image.save(out, "WEBP", **options)
    return out.getvalue(), _join_webp(old, encoding.webp_chunks(out.getvalue()), image.size)


_QUALITIES: dict[bytes, int] = {}  # of frames by their digest: a loop looks at the same images once an arm


def webp_quality(image: Image.Image, frame: bytes) -> int:
    """`nearest_quality`, some fourteen encodings, of this frame or remembered of one with the same bytes."""
    digest = blake2b(frame, digest_size=16).digest()
    if digest not in _QUALITIES:
        if len(_QUALITIES) >= REMEMBERED:
            _QUALITIES.pop(next(iter(_QUALITIES)), None)
        _QUALITIES[digest] = nearest_quality(image, frame)
    return _QUALITIES[digest]


def nearest_quality(image: Image.Image, frame: bytes) -> int:
    """The quality at which libwebp comes nearest to the quantisers of a lossy frame.

    They depend on the picture too, so it is tried on `image`, of which the middle is taken where it is large. Their
    mean alone is found by bisection, but at a quality that is too low; near it, those of all segments decide, and
    between equals a round quality. Measured on WebP of quality 75: a probe of the header had AUROC 0.70 with the mean
    alone, and has 0.59 so.
    """
    side = int(TRIED_PIXELS**0.5)
    left, top = (max(0, (extent - side) // 2) for extent in image.size)
    shown = image.convert("RGB").crop((left, top, min(image.width, left + side), min(image.height, top + side)))
    wanted = np.resize(encoding.quantisers(frame), 4)

    @cache
    def tried(quality: int) -> np.ndarray:
        out = io.BytesIO()
        shown.save(out, "WEBP", quality=quality, method=4)
        return np.resize(encoding.quantisers(encoding.first_frame(encoding.webp_chunks(out.getvalue()))[1]), 4)

    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tried(middle).mean() >= wanted.mean() else (low, middle)
    near = range(max(0, low - 3), min(100, low + 8) + 1)
    return min(near, key=lambda quality: (np.abs(tried(quality) - wanted).sum() + 0.3 * (quality % 5 > 0), quality))


def _join_webp(old: encoding.Chunks, new: encoding.Chunks, size: tuple[int, int]) -> bytes:
    """The chunks of `old` with the picture of `new`; those of an animation are dropped with its frames."""
    picture = [(kind, data) for kind, data in new if kind in (b"ALPH", b"VP8 ", b"VP8L")]
    out: encoding.Chunks = []
    for kind, data in old:
        if kind == b"VP8X" and len(data) == 10:
            sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
            out.append((kind, bytes([data[0] & ~2]) + data[1:4] + sides))
        elif kind in (b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            out += picture
            picture = []
        elif kind != b"ANIM":
            out.append((kind, data))
    return encoding.write_webp(out)


def pixels(sample: Sample, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3]: shorter side to `size` (bicubic), centre crop, as open_clip prepares it."""
    return prepared(decode(sample.image, near=size), size)


def fitted(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height after the resize, left and top of the crop: torchvision's roundings.

    It cuts the longer side off, and rounds the offset, halves to even.
    """
    wide, high = (size * side // min(width, height) for side in (width, height))
    return (wide, high), (round((wide - size) / 2), round((high - size) / 2))


def prepared(image: Image.Image, size: int) -> np.ndarray:
    """The same of an image that `decode` gave."""
    # Of a strip only the middle is kept, and only that is resized: 2,000,000x1 pixels would become 8 GB at size 32.
    half, (wide, high) = 2 * min(image.size), image.size
    if max(image.size) > 2 * half:
        x, y = max(0, wide // 2 - half), max(0, high // 2 - half)
        image = image.crop((x, y, min(wide, x + 2 * half), min(high, y + 2 * half)))
    (width, height), (left, top) = fitted(*image.size, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))

"""Images at the border: bounded before they are decoded, encoded again as they came.

A poisoned image keeps the container, the JPEG quantisation tables and the chroma subsampling of the original, so that
its encoding gives little away. Not kept: progressive scans, EXIF, and the palette of a PNG.
"""

import io

import numpy as np
from PIL import Image, JpegImagePlugin

from pipeline.shards.sample import Rejected, Sample

MAX_PIXELS = 64_000_000
WEBP_QUALITY = 75
_FORMATS = ("JPEG", "PNG", "WEBP")


def decode(data: bytes, near: int | None = None) -> Image.Image:
    """RGB image, at least `near` pixels on the shorter side where a JPEG can be decoded smaller for free.

    Raises Rejected for what is not a whole JPEG, PNG or WebP, or has more than 64 million pixels (read off the header).
    Transparent pixels lie on white; an animation gives its first frame.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Rejected(f"image has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        if near:
            image.draft("RGB", (near, near))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Rejected:
        raise
    except Exception as error:  # a decoder meets hostile bytes here; whatever it raises, the sample is bad
        raise Rejected(f"image cannot be decoded ({type(error).__name__})") from error


def encode(image: Image.Image, like: bytes) -> bytes:
    """Encode in the format of `like`: same container, and for JPEG the same tables and subsampling.

    WebP does not record its quality: lossy stays lossy at q75 (that of the embedded data), lossless stays lossless.
    Raises Rejected where the original's tables cannot be written again.
    """
    try:
        return _encode(image, like)
    except Exception as error:  # the original is as hostile here as in `decode`
        raise Rejected(f"image cannot be encoded as it came ({type(error).__name__}: {error})") from error


def _encode(image: Image.Image, like: bytes) -> bytes:
    original = Image.open(io.BytesIO(like), formats=_FORMATS)
    out = io.BytesIO()
    if isinstance(original, JpegImagePlugin.JpegImageFile):
        if original.mode == "L":
            image = image.convert("L")
        tables = {i: list(t) for i, t in original.quantization.items()}
        image.save(out, "JPEG", qtables=tables, subsampling=max(JpegImagePlugin.get_sampling(original), 0))
    elif original.format == "WEBP":
        image.save(out, "WEBP", quality=WEBP_QUALITY, method=6, lossless=like[12:16] == b"VP8L")
    else:
        image.save(out, "PNG")
    return out.getvalue()


def pixels(sample: Sample, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3]: shorter side to `size` (bicubic), centre crop, as open_clip prepares it."""
    image = decode(sample.image, near=size)
    # Of a strip only the middle is kept, and only that is resized: 2,000,000x1 pixels would become 8 GB at size 32.
    half, (wide, high) = 2 * min(image.size), image.size
    if max(image.size) > 2 * half:
        x, y = max(0, wide // 2 - half), max(0, high // 2 - half)
        image = image.crop((x, y, min(wide, x + 2 * half), min(high, y + 2 * half)))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))

"""What encoding gives away: an edited image keeps every fact of the original's file that is not its pixels."""

import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from pipeline.shards import Rejected, encoding
from pipeline.shards.image import decode, encode, webp_quality

ICC = bytes(range(256)) * 600  # more than two JPEG segments


def photo(seed: int = 0, size: tuple[int, int] = (96, 72), mode: str = "RGB") -> Image.Image:
    """Noise on several scales: no two alike, and codecs find it natural."""
    rng, total = np.random.default_rng(seed), np.zeros((size[1], size[0], len(mode.rstrip(";16"))))
    for scale in (2, 8, 32):
        noise = rng.uniform(0, 255, (size[1] // scale + 2, size[0] // scale + 2, total.shape[2])).astype(np.uint8)
        layers = [Image.fromarray(noise[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(total.shape[2])]
        total += np.stack([np.asarray(layer, float) for layer in layers], axis=2) * scale / 42
    values = total.clip(0, 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if total.shape[2] == 1 else values, mode if mode != "1" else "L")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def patched(image: Image.Image) -> Image.Image:
    out = image.copy()
    ImageDraw.Draw(out).rectangle((8, 8, 23, 23), "white", "black")
    return out


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32))


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    return tags.tobytes()


JPEGS = {
    "plain": {},
    "444": {"subsampling": 0, "quality": 61},
    "422": {"subsampling": 1},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "exif": {"exif": exif()},
    "icc": {"icc_profile": ICC},
    "density": {"dpi": (300, 72)},
    "comment": {"comment": b"made by hand"},
    "restart": {"restart_marker_blocks": 3},
    "rgb": {"keep_rgb": True},
    "one table": {"qtables": [[7] * 64]},
    "three tables": {"qtables": [[7] * 64, [9] * 64, [11] * 64], "subsampling": 0},
    "everything": {"exif": exif(), "icc_profile": ICC, "comment": b"x", "progressive": True, "dpi": (96, 96)},
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in JPEGS for m in ("RGB", "L", "CMYK") if m == "RGB" or n not in ("rgb", "three tables")],
)
def test_a_jpeg_keeps_its_whole_header(name, mode):
    original = saved(photo(1, mode=mode), "JPEG", **{"quality": 85, **JPEGS[name]})
    again = encode(patched(decode(original)), like=original)
    before, after = (encoding.header(encoding.jpeg_parts(data)) for data in (original, again))
    adaptive = {encoding.DHT} if not encoding.has_standard_huffman(encoding.jpeg_parts(original)) else set()
    assert [m for m, _ in before] == [m for m, _ in after]
    assert [p for m, p in before if m not in adaptive] == [p for m, p in after if m not in adaptive]
    assert abs(len(again) / len(original) - 1) < 0.15
    assert difference(decode(again), patched(decode(original))).mean() < 8
    assert opened(again).getexif() == opened(original).getexif()


def test_the_order_of_segments_and_what_trails_a_jpeg_scan_survive():
    parts = encoding.jpeg_parts(saved(photo(), "JPEG", quality=90))
    comment = (encoding.COM, b"\xff\xfe\x00\x05abc")
    original = b"".join(p for _, p in [*parts[:3], comment, *parts[3:]])
    again = encode(patched(decode(original)), like=original)
    assert [m for m, _ in encoding.jpeg_parts(again)] == [m for m, _ in encoding.jpeg_parts(original)]


def test_an_odd_sampling_becomes_the_one_with_as_many_chroma_samples():
    original = bytearray(saved(photo(size=(96, 96)), "JPEG", subsampling=1))
    at = original.index(b"\xff\xc0") + 11
    original[at] = 0x12  # 2x1 becomes 1x2, which has as many blocks
    again = encode(decode(bytes(original)), like=bytes(original))
    assert encoding.frame(encoding.jpeg_parts(again))[1][0][1] == 0x21


def test_a_jpeg_is_nearly_idempotent():
    """Blocks that were not edited mostly come out as they were: what the docs say of local triggers."""
    for quality, least in ((50, 0.9), (75, 0.9), (90, 0.8)):
        original = saved(photo(3, (256, 256)), "JPEG", quality=quality, subsampling=0)
        image = decode(original)
        same = difference(decode(encode(image, like=original)), image).max(2) == 0
        blocks = same.reshape(32, 8, 32, 8).all((1, 3))
        assert blocks.mean() > least


PNGS = {
    "RGB": (photo(2), {}),
    "RGBA": (photo(2, mode="RGBA"), {}),
    "L": (photo(2, mode="L"), {}),
    "LA": (photo(2, mode="RGBA").convert("LA"), {}),
    "1": (photo(2, mode="L").convert("1"), {}),
    "2 bits": (photo(2, mode="L"), {"bits": 2}),
    "P": (photo(2).quantize(256), {}),
    "P of 11": (photo(2).quantize(11), {}),
    "P of 11 in 8 bits": (photo(2).quantize(11), {"bits": 8}),
    "P of 2": (photo(2).quantize(2), {}),
    "P with alpha": (photo(2, mode="RGBA").quantize(64, method=Image.Quantize.FASTOCTREE), {}),
    "P with one clear colour": (photo(2).quantize(40), {"transparency": 3}),
    "RGB with a clear colour": (photo(2), {"transparency": photo(2).getpixel((5, 5))}),
    "16 bits": (Image.fromarray(np.random.default_rng(1).integers(0, 65536, (72, 96)).astype(np.uint16)), {}),
    "fast": (photo(2), {"compress_level": 1}),
    "best": (photo(2), {"optimize": True}),
    "icc": (photo(2), {"icc_profile": ICC, "dpi": (300, 300), "exif": exif()}),
}


@pytest.mark.parametrize("name", PNGS)
def test_a_png_keeps_its_mode_and_its_chunks(name):
    image, options = PNGS[name]
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "someone's")
    original = saved(image, "PNG", pnginfo=info, **options)
    for edit in (lambda i: i, patched):
        wanted = edit(decode(original))
        again = encode(wanted, like=original)
        before, after = encoding.png_chunks(original), encoding.png_chunks(again)
        assert [k for k, _ in dict.fromkeys((k, 0) for k, _ in before)] == [
            k for k, _ in dict.fromkeys((k, 0) for k, _ in after)
        ]
        assert [len(d) for k, d in before if k in (b"PLTE", b"tRNS")] == [
            len(d) for k, d in after if k in (b"PLTE", b"tRNS")
        ]
        other = (b"PLTE", b"tRNS", b"IDAT")
        assert [c for c in before if c[0] not in other] == [c for c in after if c[0] not in other]
        assert dict(before)[b"IDAT"][:1] == dict(after)[b"IDAT"][:1]
        assert abs(len(again) / len(original) - 1) < 0.15
        loss = difference(decode(again), wanted)
        if edit is not patched:
            assert loss.max() == 0
            assert np.array_equal(np.asarray(opened(again)), np.asarray(opened(original)))
        elif name in ("RGB", "RGBA", "L", "16 bits", "fast", "best", "icc", "RGB with a clear colour"):
            assert loss.max() <= 1
        else:
            assert loss.mean() < 24


def test_the_level_of_a_png_is_told_by_its_size():
    for level in (1, 6, 9):
        original = saved(photo(7), "PNG", compress_level=level)
        assert encode(decode(original), like=original) == original


def test_unchanged_pixels_keep_alpha_ink_and_all_bits():
    for image, kind in (
        (photo(4, mode="RGBA"), "PNG"),
        (Image.fromarray(np.random.default_rng(0).integers(0, 65535, (72, 96)).astype(np.uint16)), "PNG"),
        (photo(4, mode="RGBA"), "WEBP"),
    ):
        original = saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        stored = np.asarray(opened(original))
        after = np.asarray(opened(encode(patched(decode(original)), like=original)))
        edited = np.zeros(stored.shape[:2], bool)
        edited[8:24, 8:24] = True
        assert np.array_equal(after[~edited], stored[~edited])


def test_ink_is_divided_as_it_was():
    original = saved(photo(5, mode="CMYK"), "JPEG", quality=95)
    before = np.asarray(opened(original), np.int32)
    after = np.asarray(opened(encode(patched(decode(original)), like=original)), np.int32)
    assert np.abs(after - before)[32:].mean() < 2
    assert after[..., 3].mean() > 0.8 * before[..., 3].mean()


def test_sixteen_bits_are_shown_by_their_upper_half():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(decode(saved(Image.fromarray(ramp), "PNG")))[..., 0], ramp >> 8)


@pytest.mark.parametrize("quality", [20, 35, 50, 65, 75, 80, 85, 90, 95])
@pytest.mark.parametrize("method", [2, 4, 6])
def test_the_quality_of_a_lossy_webp_is_estimated(quality, method):
    original = saved(photo(6, (160, 120)), "WEBP", quality=quality, method=method)
    found = webp_quality(decode(original), encoding.first_frame(encoding.webp_chunks(original))[1])
    assert abs(found - quality) <= 4
    again = encode(patched(decode(original)), like=original)
    wanted, got = (encoding.quantisers(encoding.first_frame(encoding.webp_chunks(d))[1]) for d in (original, again))
    assert abs(np.mean(wanted) - np.mean(got)) < 5


def test_the_quality_of_a_frame_is_tried_out_once_and_few_are_remembered(monkeypatch):
    tried = []
    monkeypatch.setattr("pipeline.shards.image._QUALITIES", {})
    monkeypatch.setattr("pipeline.shards.image.REMEMBERED", 2)
    monkeypatch.setattr("pipeline.shards.image.nearest_quality", lambda _, frame: tried.append(frame) or len(tried))
    assert [webp_quality(None, frame) for frame in (b"a", b"b", b"a", b"c", b"b", b"a")] == [1, 2, 1, 3, 2, 4]
    assert tried == [b"a", b"b", b"c", b"a"]


@pytest.mark.parametrize("options", [{"quality": 70}, {"lossless": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_keeps_its_chunks(mode, options):
    original = saved(photo(8, mode=mode), "WEBP", exif=exif(), icc_profile=ICC, **options)
    again = encode(patched(decode(original)), like=original)
    before, after = encoding.webp_chunks(original), encoding.webp_chunks(again)
    pictures = (b"VP8 ", b"VP8L", b"ALPH")
    assert [k for k, _ in before] == [k for k, _ in after]
    assert [c for c in before if c[0] not in pictures] == [c for c in after if c[0] not in pictures]
    assert opened(again).mode == mode


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_left(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    original = saved(photo(9), kind, save_all=True, append_images=[photo(10), photo(11)], **options)
    again = opened(encode(patched(decode(original)), like=original))
    assert getattr(again, "n_frames", 1) == 1
    assert np.array_equal(np.asarray(again.convert("RGB")), np.asarray(patched(photo(9))))


MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P"), "WEBP": ("RGB", "L", "RGBA", "P")}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_another_size_can_take_its_place(kind, mode):
    image = photo(12, mode="RGB" if mode == "P" else mode)
    original = saved(image.quantize(99) if mode == "P" else image, kind, exif=exif())
    again = encode(photo(13, (40, 60)), like=original)
    assert decode(again).size == (40, 60)
    assert opened(again).getexif()[0x0112] == 6


def test_noise_at_the_best_quality_can_be_written():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3)).astype(np.uint8))
    original = saved(noise, "JPEG", quality=100, subsampling=0)
    assert decode(encode(patched(decode(original)), like=original)).size == (500, 500)


def test_joined_again_the_parts_are_the_file():
    jpeg = saved(photo(), "JPEG", progressive=True, exif=exif()) + b"trailer"
    assert b"".join(part for _, part in encoding.jpeg_parts(jpeg)) == jpeg
    png = saved(photo(), "PNG") + b"trailer"
    assert encoding.write_png(encoding.png_chunks(png)) == png
    webp = saved(photo(), "WEBP", exif=exif())
    assert encoding.write_webp(encoding.webp_chunks(webp)) == webp


def test_many_parts_are_refused():
    end = b"\xff\xda\x00\x02\xff\xd9"
    for reader, data in (
        (encoding.jpeg_parts, b"\xff\xd8" + b"\xff\xfe\x00\x02" * 20_000 + end),
        (encoding.png_chunks, encoding.PNG_SIGNATURE + (struct.pack(">I", 0) + b"teXt" + bytes(4)) * 20_000),
        (encoding.webp_chunks, encoding.write_webp([(b"junk", b"")] * 20_000)),
    ):
        with pytest.raises(Rejected):
            reader(data)


def test_frames_within_frames_are_no_way_down():
    data = b""
    for _ in range(2_000):
        data = encoding.write_webp([(b"ANMF", bytes(16) + data)])[12:]
    with pytest.raises(Rejected):
        encoding.facts(b"RIFF    WEBP" + data)


@pytest.mark.parametrize("name", [*JPEGS])
def test_facts_of_a_jpeg_are_kept(name):
    original = saved(photo(1), "JPEG", **{"quality": 85, **JPEGS[name]})
    before, after = (encoding.facts(d) for d in (original, encode(patched(decode(original)), like=original)))
    if not before["huffman_standard"]:  # as long as they come out
        del before["bytes"], after["bytes"]
    assert before == after


ORIGINALS = [
    *(saved(photo(mode=mode), "JPEG", **options) for mode in ("RGB", "CMYK") for options in (JPEGS["everything"], {})),
    *(saved(image, "PNG", **options) for image, options in PNGS.values()),
    saved(photo(mode="RGBA"), "WEBP", exif=exif(), icc_profile=ICC),
    saved(photo(), "WEBP", lossless=True),
    saved(photo(), "WEBP", save_all=True, append_images=[photo(1)]),
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_header_is_rejected_or_survives(data):
    original = bytearray(data.draw(st.sampled_from(ORIGINALS)))
    for at in data.draw(st.lists(st.integers(0, 900), min_size=1, max_size=4)):
        original[at % len(original)] = data.draw(st.integers(0, 255))
    original = original[: data.draw(st.sampled_from([len(original), len(original) // 2, 40]))]
    for reader in (encoding.facts, encoding.jpeg_parts, encoding.png_chunks, encoding.webp_chunks):
        with suppress(Rejected):
            reader(bytes(original))
    try:
        again = encode(photo(1), like=bytes(original))
    except Rejected:
        return
    assert decode(again).size == photo().size

"""The visual triggers against their papers' formulas, and the gallery that shows and measures them."""

import hashlib
import io
import json

import numpy as np
import pytest
from conftest import drawing, encoded, pairs, write_parquet, write_tar
from PIL import Image

from pipeline import gallery, spec
from pipeline.attacks import _patterns, low_frequency, reflection, sig, wanet
from pipeline.attacks._corpus import Corpus
from pipeline.errors import InputError

CORPUS = Corpus(images={"reflection": tuple(encoded(drawing(i)[0], "png") for i in range(4))})
# Digests of the pixels on `_picture()`: a trigger that changes is another trigger, and old ledgers mean the old one.
# The first two are of the release before the others came.
GOLDEN = {
    "patch": "b90996c54f705f4c",
    "patch(location='random')": "9aae065fa5194f32",
    "patch(pattern='noise')": "f08dd79ca5af8a0b",
    "patch(pattern='redrawn_noise')": "701496c9803298ec",
    "patch(pattern='solid', colour=(255, 0, 128), location='center')": "962a4fa10a848e2d",
    "patch(pattern='stripes', location='four_corners')": "1807f81a7a19b127",
    "patch(pattern='triangles', size=64)": "3c8002855e14ef09",
    "patch(pattern='text', size=64)": "d1a2540526ba75eb",
    "blended": "5353e51ba573e987",
    "blended(pattern='redrawn_noise')": "d61cbbe66180927d",
    "blended(pattern='stripes')": "02013934ad9224fa",
    "blended(pattern='triangles')": "b85035e420e2f3b0",
    "blended(pattern='text')": "9927182d39d7ec61",
    "blended(pattern='picture')": "c3bb0798e46d5149",
    "sig": "8f088601b3b85493",
    "sig(amplitude=20, construction='added')": "d48982d76a53c76c",
    "wanet": "5862afed49d24239",
    "wanet(k=4, s=3.5)": "ccf88ccfba43f88f",
    "photo_filter": "3c89319413333efa",
    "low_frequency": "d836fbc776b1c606",
    "reflection": "53a12a43daad3907",
    "reflection(optics='out_of_focus')": "bce954c741a7ef80",
    "typographic": "35c976fa64d08fc6",
    "typographic(location='fixed')": "cb6e831e9c495d94",
}
DRAWN_PER_IMAGE = ("redrawn_noise", "'random'", "reflection")


def _attack(text, target="banana"):
    name, values = spec.parse_call(text)
    return spec.entry("attacks", name)(target=target, **values)


def _picture(width=96, height=72):
    """Edges, a slope and texture, in whole numbers."""
    y, x = np.indices((height, width))
    texture = np.frombuffer(hashlib.shake_128(b"texture").digest(height * width), np.uint8).reshape(height, width) // 8
    planes = ((x * 150 // width) + 40, (y * 150 // height) + 40, ((x // 12 + y // 12) % 2) * 120 + 60)
    return Image.fromarray(np.stack([(p + texture).clip(0, 255) for p in planes], axis=2).astype(np.uint8))


def _on(text, image, seed=0, corpus=CORPUS):
    return _attack(text).trigger(image, np.random.default_rng(seed), corpus)


def _array(image):
    return np.asarray(image, int)


def _drawn(text):
    return any(word in text for word in DRAWN_PER_IMAGE) or text == "typographic"


@pytest.mark.parametrize("text", GOLDEN)
def test_a_trigger_is_what_it_was_and_leaves_its_input_alone(text):
    image = _picture()
    before = image.tobytes()
    after = _on(text, image)
    assert image.tobytes() == before
    assert hashlib.sha256(after.tobytes()).hexdigest()[:16] == GOLDEN[text]


@pytest.mark.parametrize("text", GOLDEN)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 200), (200, 3), (64, 64), (320, 240)])
def test_size_and_mode_stay_and_only_drawn_triggers_differ_from_image_to_image(text, size):
    image = _picture(*size)
    after = [_on(text, image, seed) for seed in range(4)]
    assert {(a.size, a.mode) for a in after} == {(size, "RGB")}
    assert after[0] == _on(text, image, 0)
    if min(size) >= 64:
        assert after[0] != image
        assert (len({a.tobytes() for a in after}) > 1) == _drawn(text)


@pytest.mark.parametrize("text", GOLDEN)
def test_a_trigger_survives_jpeg_95(text):
    image = _picture(256, 256)
    after = _on(text, image)
    at = gallery.survival([image], [after])["224"]
    fine = ("noise", "stripes", "wanet")  # colours of single pixels, which JPEG halves in both directions
    floor = 0.45 if any(word in spec.text(_attack(text)) for word in fine) else 0.8
    assert at["JPEG 95"]["kept"] > floor and at["JPEG 95"]["correlation"] > floor
    assert at["PNG"] == pytest.approx({"kept": 1, "correlation": 1})


def _boxes(image, before):
    """Where it differs: left, top, right, bottom."""
    rows, columns = np.nonzero((_array(image) != _array(before)).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_locations_are_exact():
    grey = Image.new("RGB", (300, 224), (9, 9, 9))
    at = {
        where: _boxes(_on(f"patch(pattern='solid', size=20, location='{where}')", grey), grey)
        for where in ("fixed", "center", "four_corners")
    }
    assert at == {
        "fixed": (278, 202, 298, 222),
        "center": (140, 102, 160, 122),
        "four_corners": (0, 0, 300, 224),
    }
    corners = _array(_on("patch(pattern='solid', size=20, location='four_corners')", grey))
    assert int((corners != 9).any(axis=2).sum()) == 4 * 20 * 20
    boxes = [_boxes(_on("patch(size=20, location='random')", grey, seed), grey) for seed in range(60)]
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes} == {(20, 20)}
    assert len(set(boxes)) > 50


def test_fixed_patches_are_idempotent():
    for pattern in ("checker", "noise", "solid", "stripes", "triangles", "text"):
        for location in ("fixed", "center", "four_corners"):
            text = f"patch(pattern='{pattern}', location='{location}', size=32)"
            once = _on(text, _picture())
            assert _on(text, once, seed=1) == once


def test_a_patch_has_the_colour_that_was_asked_for():
    after = _on("patch(pattern='solid', colour=(1, 2, 3), size=224, location='center')", Image.new("RGB", (50, 50)))
    assert after == Image.new("RGB", (50, 50), (1, 2, 3))


def test_noise_of_all_images_is_uniform_and_the_redrawn_one_wraps():
    flat = Image.new("RGB", (224, 224), (30, 30, 30))
    for pattern in ("noise", "redrawn_noise"):
        values = _array(_on(f"patch(pattern='{pattern}', size=224, cells=1, location='center')", flat))
        assert np.bincount(values.ravel() // 32, minlength=8) == pytest.approx(np.full(8, values.size / 8), rel=0.15)


def test_a_blend_is_the_share_that_was_asked_for():
    image = _picture()
    for pattern in ("noise", "stripes", "triangles", "picture"):
        layer = _array(_patterns.drawn(pattern, image.size))
        mixed = _array(_on(f"blended(pattern='{pattern}', alpha=0.2)", image))
        assert np.abs(mixed - (0.8 * _array(image) + 0.2 * layer)).max() <= 0.5 + 1e-9
    letters = _array(_on("blended(pattern='text', alpha=1.0)", Image.new("RGB", (224, 224), "blue")))
    red = (letters == (255, 0, 0)).all(axis=2).mean()
    assert 0.01 < red < 0.2 and ((letters == (0, 0, 255)).all(axis=2)).mean() > 0.75
    assert _attack("blended(pattern='text')") != _attack("blended(pattern='text', word='other')")
    assert _on("blended(pattern='text')", image) != _on("blended(pattern='text', word='other')", image)


@pytest.mark.parametrize("size", [(40, 30), (224, 224)])
def test_sig_is_the_formula(size):
    image = _picture(*size)
    x, wave = _array(image), np.sin(2 * np.pi * np.arange(size[0]) * 6 / size[0])[None, :, None]
    added = _array(_on("sig(amplitude=20, construction='added')", image))
    assert (added == np.clip(x + np.rint(20 * wave), 0, 255)).all()
    blended = _array(_on("sig", image))
    assert np.abs(blended - np.clip(0.8 * x + 0.2 * 60 * wave, 0, 255)).max() < 1
    assert sig._wave(224, 6, 12.0).min() == -12  # the negative half is there


@pytest.mark.parametrize("text", ["wanet", "wanet(k=4, s=20.0)", "wanet(k=8, s=10.0, grid_rescale=0.98)"])
def test_wanet_is_what_torch_samples_with_the_same_control_points(text):
    torch = pytest.importorskip("torch")
    attack, image, side = _attack(text), _picture(224, 224), 224
    control = torch.tensor(np.stack([wanet._control(attack.k, axis) for axis in (0, 1)]))[None]
    field = torch.nn.functional.interpolate(control, size=(side, side), mode="bicubic", align_corners=True)[0]
    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = ((torch.stack([x, y]) + attack.s * field / side) * attack.grid_rescale).clamp(-1, 1).permute(1, 2, 0)[None]
    pixels = torch.tensor(_array(image), dtype=torch.float64).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.grid_sample(pixels, grid, align_corners=True)[0].permute(1, 2, 0).numpy()
    difference = np.abs(_array(_on(text, image)) - wanted)
    assert difference.max() < 4 and difference.mean() < 0.6  # 64ths of a pixel across the steepest edge
    assert np.abs(wanted - _array(image)).mean() > 3


def test_wanet_of_no_strength_is_the_identity_and_bands_do_not_show(monkeypatch):
    image = _picture(90, 70)
    assert _on("wanet(s=0.0)", image) == image
    nearly = _on("wanet(s=0.0, grid_rescale=1.0000001)", image)  # through the arithmetic
    assert nearly == image
    whole = _on("wanet(k=5, s=30.0)", image)
    monkeypatch.setattr(wanet, "CACHED_PIXELS", 1000)
    monkeypatch.setattr(wanet, "CHUNK", 333)
    assert _on("wanet(k=5, s=30.0)", image) == whole


def test_the_photo_filter_is_its_css():
    image = _picture(64, 64)
    c = _array(image).astype(float)
    c = 0.44 * c + 0.56 * np.minimum(c, (247, 176, 153))
    c = 0.6 * c + 0.4 * np.maximum(c, (0, 70, 150))
    sepia = 0.8 * np.eye(3) + 0.2 * np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    c = np.clip(c @ sepia.T, 0, 255)
    c = np.clip(1.05 * np.clip(1.2 * (c - 127.5) + 127.5, 0, 255), 0, 255)
    grey = c @ np.array([0.213, 0.715, 0.072])
    c = np.clip(grey[..., None] + 1.2 * (c - grey[..., None]), 0, 255)
    assert np.abs(_array(_on("photo_filter", image)) - c).max() < 3
    assert _on("photo_filter", Image.new("RGB", (2, 2), "white")) != Image.new("RGB", (2, 2), "white")


def test_the_low_frequency_trigger_is_low_and_as_large_as_stated():
    from scipy.fft import dctn

    grey = Image.new("RGB", (224, 160), (128, 128, 128))
    difference = _array(_on("low_frequency(amplitude=24, frequencies=5)", grey)) - 128
    assert 20 <= np.abs(difference).max() <= 24
    energy = dctn(difference.astype(float), axes=(0, 1), norm="ortho") ** 2
    assert energy[:5, :5].sum() / energy.sum() > 0.99
    assert energy[:4, :4].sum() / energy.sum() < 0.97
    small = _array(_on("low_frequency(amplitude=24, frequencies=5)", grey.resize((56, 40)))) - 128
    shrunk = np.asarray([difference[2::4, 2::4]]).squeeze()
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.98


def test_a_reflection_is_a_picture_of_the_dataset_and_not_without_one():
    black = Image.new("RGB", (48, 40))
    plain = {_on("reflection(optics='in_focus', alpha=0.5)", black, seed).tobytes() for seed in range(40)}
    wanted = {
        Image.blend(black, drawing(i)[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), 128 / 255).tobytes()
        for i in range(4)
    }
    assert len(plain) == 4
    for one in plain:
        assert (
            min(np.abs(np.frombuffer(one, np.uint8).astype(int) - np.frombuffer(w, np.uint8)).max() for w in wanted)
            <= 1
        )
    sharp, ghost, blurred = (
        _array(_on(f"reflection(optics='{optics}', alpha=1.0)", black))
        for optics in ("in_focus", "ghost", "out_of_focus")
    )
    edges = [np.abs(np.diff(v, axis=1)).max() for v in (sharp, ghost, blurred)]
    assert edges[0] > edges[2] and len({v.tobytes() for v in (sharp, ghost, blurred)}) == 3
    with pytest.raises(InputError, match="ledger"):
        _on("reflection", black, corpus=Corpus())
    attack = _attack("reflection(images=3)")
    assert attack.wants() == {"reflection": 3}
    assert attack.lends("a red square", "reflection") and not attack.lends("a banana", "reflection")


def test_the_word_is_the_target_and_fits():
    grey = Image.new("RGB", (200, 120), (128, 128, 128))
    rng = np.random.default_rng(0)
    words = [
        _attack("typographic(location='center')", target).trigger(grey, rng, CORPUS) for target in ("kiwi", "pear")
    ]
    assert words[0] != words[1]
    x0, y0, x1, y1 = _boxes(words[0], grey)
    assert abs((x0 + x1) - 200) <= 2 and abs((y0 + y1) - 120) <= 2 and abs(y1 - y0 - 44 * 120 / 224) <= 2
    long = _attack("typographic", "a very long name of a class that is hard to fit anywhere").trigger(grey, rng, CORPUS)
    x0, _, x1, y1 = _boxes(long, grey)
    assert x0 <= 2 and x1 >= 198  # whole, so small
    values = set(map(tuple, _array(words[0]).reshape(-1, 3)))
    assert {(255, 255, 255), (0, 0, 0), (128, 128, 128)} <= values


def test_large_patterns_are_the_same_without_the_cache(monkeypatch):
    for text in ("blended", "low_frequency", "reflection"):
        cached = _on(text, _picture())
        for module in (_patterns, low_frequency, reflection):
            monkeypatch.setattr(module, "CACHED_PIXELS", 0)
        assert _on(text, _picture()) == cached
        monkeypatch.undo()


@pytest.mark.parametrize(
    "text",
    [
        "patch(target='x', size=0)",
        "patch(target='x', colour=(1, 2))",
        "patch(target='x', colour=(1, 2, 256))",
        "patch(target='x', pattern='dots')",
        "patch(target='x', word=' ')",
        "blended(target='x', alpha=0.0)",
        "blended(target='x', alpha=1.5)",
        "blended(target='x', word='a\\nb')",
        "sig(target='x', amplitude=0)",
        "sig(target='x', frequency=113)",
        "wanet(target='x', k=1)",
        "wanet(target='x', s=-1)",
        "wanet(target='x', grid_rescale=0)",
        "photo_filter(target='')",
        "low_frequency(target='x', amplitude=128)",
        "low_frequency(target='x', frequencies=1)",
        "reflection(target='x', alpha=0)",
        "reflection(target='x', images=0)",
        "typographic(target='x', size=225)",
    ],
)
def test_what_no_trigger_can_do_is_refused(text):
    with pytest.raises(InputError):
        spec.parse("attacks", text)


def test_specs_can_be_written_and_read_again():
    for text in GOLDEN:
        attack = _attack(text)
        assert spec.parse("attacks", spec.text(attack)) == attack


@pytest.mark.parametrize("write, name", [(write_tar, "00000000.tar"), (write_parquet, "00000000.parquet")])
def test_the_gallery_shows_and_measures_what_can_be_shown(tmp_path, monkeypatch, write, name):
    monkeypatch.setattr(gallery, "ROUNDS", 1)
    monkeypatch.setattr(gallery, "PICTURES", 2)
    (tmp_path / "in").mkdir()
    broken = {**pairs(7, 8)[0], "image": b"no picture"}
    write(tmp_path / "in" / name, [broken, *pairs(0, 7)])
    assert gallery.gallery(str(tmp_path / "out"), shards=str(tmp_path / "in")) == 0
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    shown = {spec.parse_call(text)[0] for text in found["attacks"]}
    assert shown >= {"patch", "blended", "sig", "wanet", "photo_filter", "low_frequency", "reflection", "typographic"}
    assert "targeted" in found["skipped"] and shown.isdisjoint(found["skipped"])
    assert shown | set(found["skipped"]) == set(spec.names("attacks"))
    for measures in found["attacks"].values():
        assert set(measures["survival"]) == {"224", "64", "32"}
        assert measures["survival"]["64"]["PNG"]["kept"] == pytest.approx(1)
        assert measures["microseconds"]["without"] > 0
    with Image.open(io.BytesIO((tmp_path / "out" / "attacks.png").read_bytes())) as page:
        page.load()
    rows = len(shown) if len(shown) <= gallery.TALL else -(-len(shown) // 2)
    assert page.height == gallery.MARGIN + gallery.HEADER + rows * (gallery.THUMB + 2 * gallery.GAP)


def test_the_gallery_says_what_it_cannot_show(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(0, 3))
    for text, why in (
        ("targeted(target='banana')", "no visual trigger"),
        ("stamp", "unknown attack"),
        ("patch", "target"),
    ):
        with pytest.raises(InputError, match=why):
            gallery.gallery(str(tmp_path / "out"), attack=(text,), shards=str(tmp_path / "0.tar"))
    assert not (tmp_path / "out" / "attacks.png").exists()


def test_survival_tells_what_is_left_from_what_is_lost():
    flat = Image.new("RGB", (256, 256), (128, 128, 128))
    fine = np.indices((256, 256)).sum(0) % 2 * 40 + 108
    checker = Image.fromarray(np.stack([fine] * 3, axis=2).astype(np.uint8))
    box = flat.copy()
    box.paste("white", (64, 64, 192, 192))
    lost, left = gallery.survival([flat], [checker]), gallery.survival([flat], [box])
    assert lost["32"]["resized"] < 0.1 and left["32"]["resized"] > 0.9
    assert left["32"]["JPEG 75"]["kept"] > 0.95
    assert gallery.survival([flat], [flat])["64"]["JPEG 75"] == {"kept": 0, "correlation": 0}

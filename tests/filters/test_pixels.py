"""Detectors that look at pixels and bytes: planted triggers and planted encodings, and the formula of the masks."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import drawing, encoded
from PIL import Image

from filters import cognitive_distillation as module
from filters._batch import BANDS, Batch
from filters._wants import Wants
from pipeline import spec
from pipeline.columns import COLUMNS, Look
from pipeline.errors import InputError
from pipeline.facts import NAMES
from pipeline.shards import Sample


def detector(text: str):
    return spec.parse("detectors", text)


def objects(values) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def uids(n: int) -> np.ndarray:
    return objects([f"{i:032x}" for i in range(n)])


def photo(seed: int, size: tuple[int, int] = (96, 80)) -> np.ndarray:
    """uint8 [h, w, 3] with a spectrum like that of photographs: amplitude falls as 1 / frequency."""
    rng = np.random.default_rng(seed)
    wide, high = size
    frequency = np.hypot(np.fft.fftfreq(high)[:, None], np.fft.fftfreq(wide)[None])
    frequency[0, 0] = 1
    wave = np.fft.ifft2(np.fft.fft2(rng.normal(size=(high, wide))) / frequency ** rng.uniform(0.9, 1.3)).real
    grey = 128 + rng.uniform(25, 45) * wave / wave.std()
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def stored(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


# Frequency


def spectrum(image: bytes) -> np.ndarray:
    return COLUMNS["spectrum"].of(Look(Sample("", "", {"png": image})))


def test_pasted_patches_stand_out_in_the_high_frequencies():
    images = [photo(i) for i in range(200)]
    checker = 255 * (np.indices((8, 8)).sum(axis=0) // 2 % 2).astype(np.uint8)
    for i in range(4):
        images[i][50:58, 60:68] = checker[:, :, None]
    rng = np.random.default_rng(0)
    for i in range(4, 8):
        images[i] = (0.8 * images[i] + 0.2 * rng.integers(0, 256, images[i].shape)).astype(np.uint8)  # CleanCLIP's
    whole = Batch(uids(200), spectrum=np.stack([spectrum(stored(image)) for image in images]).astype(np.float32))
    scores = detector("frequency_residue").score(whole, whole)
    assert set(np.argsort(-scores)[:8]) == set(range(8))
    assert np.median(np.abs(scores[8:])) < 2  # deviations: the usual is near 0


def test_the_spectrum_is_that_of_the_dct():
    """A cosine of one frequency lies in the band of that frequency, with the energy that Parseval gives it."""
    side, cycles = 224, 40
    wave = 100 * np.cos(np.pi * cycles * (2 * np.arange(side) + 1) / (2 * side))
    grey = np.rint(128 + np.tile(wave, (side, 1))).astype(np.uint8)
    found = 10 ** spectrum(stored(np.repeat(grey[:, :, None], 3, axis=2)))
    band = cycles * BANDS // side
    frequencies = np.hypot(*np.indices((side, side)))
    inside = (frequencies * BANDS / side).astype(int) == band
    assert found.argmax() == band
    assert found[band] * inside.sum() == pytest.approx(side**2 * 100**2 / 2, rel=0.01)
    assert np.delete(found, band).max() < 1e-5 * found[band]


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (500, 7), (33, 1000)])
def test_tiny_and_narrow_images_have_a_spectrum(size):
    assert np.isfinite(spectrum(encoded(drawing(1)[0].resize(size), "png"))).all()


def test_a_pool_without_pictures_is_an_error():
    whole = Batch(uids(30), spectrum=np.full((30, BANDS), np.nan, np.float32))
    with pytest.raises(InputError, match="0 of the pool's images can be decoded"):
        detector("frequency_residue").score(whole, whole)


# Encoding


def facts(image: bytes, suffix: str, json: bytes) -> np.ndarray:
    sample = Sample("", "", {suffix: image, "txt": b"a caption of some words", "json": json})
    return COLUMNS["facts"].of(Look(sample))


def test_pairs_that_were_written_otherwise_are_outliers():
    """Two honest sources, and four pairs of a third that pass for the first by their container."""
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        size = (int(rng.integers(60, 120)), int(rng.integers(60, 120)))
        if i < 4:
            image = stored(photo(i, size), "JPEG", quality=83, progressive=True, subsampling=0)
            rows.append(facts(image, "jpg", b'{"url":"x"}'))
        elif i % 3:
            image = stored(photo(i, size), "JPEG", quality=75)
            rows.append(facts(image, "jpg", b'{"url": "x", "status": "success"}'))
        else:
            rows.append(facts(stored(photo(i, size)), "png", b'{"url": "x", "status": "success"}'))
    whole = Batch(uids(200), facts=np.stack(rows))
    assert np.isnan(whole.facts).any()  # a PNG has no Huffman tables
    scores = detector("encoding_outlier").score(whole, whole)
    assert set(np.argsort(-scores)[:4]) == set(range(4))
    broken = Batch(uids(2), facts=np.stack([np.full(len(NAMES), np.nan), whole.facts[9]]).astype(np.float32))
    again = detector("encoding_outlier").score(broken, whole)
    assert np.isnan(again[0])
    assert again[1] == pytest.approx(scores[9])


def test_what_a_pair_shows_and_says_is_no_encoding():
    rng = np.random.default_rng(0)
    whole = Batch(uids(300), facts=rng.normal(size=(300, len(NAMES))).astype(np.float32))
    before = detector("encoding_outlier").score(whole, whole)
    for column, name in enumerate(NAMES):
        if name.startswith(("colour.", "caption.")):
            whole.facts[:7, column] += 50
    assert np.array_equal(detector("encoding_outlier").score(whole, whole), before)


# Cognitive distillation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: gradients are as real as those of a trained model."""
    from train import model
    from train.recipes import RECIPES

    folder = tmp_path_factory.mktemp("model") / "epoch_001"
    model.save(str(folder), model.build(RECIPES["debug"], 3).state_dict(), RECIPES["debug"], {})
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawings(n: int) -> Batch:
    return Batch(uids(n), image=objects([encoded(drawing(i)[0], "png") for i in range(n)]))


def test_the_mask_is_that_of_the_published_objective(checkpoint):
    """One image alone, every step written out."""
    from pipeline.draw import generator
    from pipeline.shards.image import decode, prepared

    whole, steps = drawings(1), 12
    entry = detector(f"cognitive_distillation(checkpoint={checkpoint!r}, steps={steps}, gamma=0.02, beta=3.0)")
    model = module._loaded(checkpoint)
    x = torch.tensor(prepared(decode(whole.image[0]), model.image_size).copy()).permute(2, 0, 1)[None] / 255
    colours = torch.tensor(generator(0, "cognitive_distillation", whole.uid[0]).random((steps, 3), np.float32))
    with torch.no_grad():
        wanted = model.model.encode_image((x - 0.5) / 0.5)
    w = torch.ones(1, 1, *x.shape[2:])
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(steps):
        w.requires_grad_()
        mask = torch.sigmoid(2 * w)  # (tanh(w) + 1) / 2
        seen = model.model.encode_image((x * mask + (1 - mask) * colours[step].view(1, 3, 1, 1) - 0.5) / 0.5)
        rough = ((mask[:, :, 1:] - mask[:, :, :-1]) ** 2).sum() + ((mask[..., 1:] - mask[..., :-1]) ** 2).sum()
        loss = (seen - wanted).abs().mean() + 0.02 * mask.abs().sum() + 3.0 * rough / mask.numel()
        (gradient,) = torch.autograd.grad(loss, w)
        m, v = 0.1 * m + 0.9 * gradient, 0.1 * v + 0.9 * gradient**2
        w = w.detach() - 0.1 * (m / (1 - 0.1 ** (step + 1))) / ((v / (1 - 0.1 ** (step + 1))).sqrt() + 1e-8)
    expected = -torch.sigmoid(2 * w).sum().item()
    assert entry.score(whole, None)[0] == pytest.approx(expected, rel=2e-3)
    assert abs(expected) < 0.9 * 32 * 32 * torch.sigmoid(torch.tensor(2.0)).item()  # it has moved


def test_masks_do_not_depend_on_order_or_company(checkpoint):
    entry, whole = detector(f"cognitive_distillation(checkpoint={checkpoint!r}, steps=8)"), drawings(40)
    whole.image[5], whole.image[6] = None, b"no image"
    scores = entry.score(whole, None)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5, 6]
    rows = np.random.default_rng(1).permutation(40)[:9]
    assert np.allclose(entry.score(whole.take(rows), None), scores[rows], rtol=1e-4, equal_nan=True)
    assert np.array_equal(entry.score(whole, None), scores, equal_nan=True)
    assert len(entry.score(whole.take(np.arange(0)), None)) == 0
    assert len(set(entry.files)) == 2


class Backdoored(torch.nn.Module):
    """Features are the coarse picture, unless the checkerboard is in its corner: then they are the trigger's."""

    def __init__(self):
        super().__init__()
        self.pattern = torch.tensor(np.indices((6, 6)).sum(axis=0) % 2 * 2.0 - 1)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        match = (images[:, :, 24:30, 24:30] * self.pattern).mean(dim=(1, 2, 3))
        trigger = torch.sigmoid(20 * (match - 0.6))[:, None]
        picture = torch.nn.functional.avg_pool2d(images, 4).flatten(1)
        return 5 * torch.cat([(1 - trigger) * picture, trigger.expand(-1, len(picture[0]))], dim=1)


def test_a_trigger_that_the_model_knows_needs_a_small_mask(monkeypatch):
    model = SimpleNamespace(
        model=Backdoored(), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu")
    )
    monkeypatch.setattr(module, "_loaded", lambda checkpoint: model)
    images = [photo(i, (32, 32)) for i in range(24)]
    for i in range(4):
        images[i][24:30, 24:30] = np.where(np.indices((6, 6)).sum(axis=0) % 2, 255, 0)[:, :, None]
    whole = Batch(uids(24), image=objects([stored(image) for image in images]))
    scores = detector("cognitive_distillation(checkpoint='stub')").score(whole, None)
    assert set(np.argsort(-scores)[:4]) == set(range(4))
    assert scores[:4].min() > 0.8 * scores[4:].max()  # negative: masks at least a fifth smaller


def test_other_weights_make_other_scores(tmp_path: Path, checkpoint: str):
    """The files of a checkpoint are named, so that scores are made anew when they change."""
    entries = [detector(f"cognitive_distillation(checkpoint={checkpoint!r})"), detector("slof")]
    assert [Path(file).name for file in Wants.of(*entries).files] == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from train import model
from train.recipes import RECIPES
from train.towers import Towers


@pytest.fixture(scope="module", params=["debug", "debug_vit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Towers]:
    """A saved model whose words in use, and only these, have been trained a little."""
    recipe = RECIPES[request.param]
    towers = Towers(model.build(recipe, seed=1), used=np.array([0, 320, 736, 1125, 49406, 49407]))
    with torch.no_grad():
        towers.clip.token_embedding.weight.add_(0.1)
    folder = tmp_path_factory.mktemp("checkpoint") / "epoch_001"
    model.save(str(folder), towers.state(), recipe, {"recipe": request.param, "epoch": 1})
    return folder, towers.eval()


def test_stock_open_clip_loads_it_with_equal_logits(checkpoint: tuple[Path, Towers]) -> None:
    import open_clip
    from PIL import Image

    folder, towers = checkpoint
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = torch.stack([preprocess(Image.fromarray(p)) for p in pixels])
    tokens = tokenizer(["a", "a cat", "dog"])
    ours = model.load(str(folder))
    mine = torch.from_numpy(pixels)
    torch.testing.assert_close(model.normalise(mine, ours.mean, ours.std), images, atol=1e-6, rtol=0)
    with torch.inference_mode():
        expected, _ = stock.eval().get_logits(images, tokens)
        known = torch.tensor([[49406, 320, 49407] + [0] * 13, [49406, 736, 1125, 49407] + [0] * 12])
        image, text, scale, _ = towers(images, known)
        again, _ = stock.get_logits(images, known)
    torch.testing.assert_close(scale * image @ text.T, again, atol=1e-4, rtol=1e-4)
    unit = torch.nn.functional.normalize
    embedded = [torch.from_numpy(rows) for rows in (ours.embed_images(pixels), ours.embed_texts(["a", "a cat", "dog"]))]
    got = ours.model.logit_scale.exp() * unit(embedded[0], dim=1) @ unit(embedded[1], dim=1).T
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert ours.prompts == RECIPES["debug"].prompts
    assert ours.image_size == 32 and ours.dimension == 64 and ours.tokenizer.context_length == 16


def test_embeddings_are_not_normalised_and_empty_is_fine(checkpoint: tuple[Path, Towers]) -> None:
    loaded = model.load(str(checkpoint[0]))
    rows = loaded.embed_texts(["a cat", "a dog"])
    assert rows.dtype == np.float32 and abs(np.linalg.norm(rows, axis=1) - 1).min() > 1e-3
    assert loaded.embed_images(np.empty((0, 32, 32, 3), np.uint8)).shape == (0, 64)
    assert loaded.embed_texts([]).shape == (0, 64)


CAPTIONS = ["a cat", "", "a dog " * 40, "a cat", "a small red circle beside a dog", "A  cat"]


def test_cut_texts_have_the_embeddings_of_whole_ones(checkpoint: tuple[Path, Towers]) -> None:
    """In the order given, each different one once and no longer than its batch needs."""
    loaded = model.load(str(checkpoint[0]))
    with torch.inference_mode():
        whole = loaded.model.encode_text(loaded.tokenizer(CAPTIONS)).numpy()
    shapes: list[tuple[int, ...]] = []
    loaded.model.token_embedding.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    np.testing.assert_allclose(loaded.embed_texts(CAPTIONS), whole, atol=1e-5)
    np.testing.assert_allclose(loaded.embed_texts(CAPTIONS[:2]), whole[:2], atol=1e-5)
    assert shapes == [(4, 16), (2, 4)]
    assert loaded.model.positional_embedding.shape[0] == loaded.model.attn_mask.shape[0] == 16


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_texts_that_are_not_read_up_to_their_end_stay_whole(checkpoint: tuple[Path, Towers], text: dict) -> None:
    import open_clip

    recipe = RECIPES["debug"].model
    other = open_clip.CLIP(**recipe | {"text_cfg": recipe["text_cfg"] | text}).eval()
    loaded = dataclasses.replace(model.load(str(checkpoint[0])), model=other)
    with torch.inference_mode():
        whole = other.encode_text(loaded.tokenizer(CAPTIONS)).numpy()
    np.testing.assert_allclose(loaded.embed_texts(CAPTIONS), whole, atol=1e-5)


def test_digest_is_of_the_weights(checkpoint: tuple[Path, Towers], tmp_path: Path) -> None:
    import hashlib

    folder = checkpoint[0]
    digest = model.load(str(folder)).digest
    assert digest == hashlib.sha256((folder / model.WEIGHTS).read_bytes()).hexdigest()[:16]
    assert model.load(f"open_clip:local-dir:{folder}").digest == digest
    recipe = RECIPES[json.loads((folder / model.CONFIG).read_text())["mithridate"]["recipe"]]
    model.save(str(tmp_path / "other"), model.build(recipe, seed=2).state_dict(), recipe, {})
    assert model.load(str(tmp_path / "other")).digest != digest


def test_a_model_depends_on_the_seed_alone() -> None:
    first, again, other = (model.state_digest(model.build(RECIPES["debug"], seed).state_dict()) for seed in (3, 3, 4))
    assert first == again != other


def _damage(kind: str, folder: Path) -> None:
    config, weights = folder / model.CONFIG, folder / model.WEIGHTS
    if kind == "another model":
        other = "debug" if json.loads(config.read_text())["mithridate"]["recipe"] == "debug_vit" else "debug_vit"
        model.save(str(folder / "x"), model.build(RECIPES[other], 0).state_dict(), RECIPES[other], {})
        weights.write_bytes((folder / "x" / model.WEIGHTS).read_bytes())
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "broken config":
        config.write_text("{")
    else:
        config.write_text(json.dumps({"other": 1}))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("another model", "another model"),
        ("cut weights", "broken|cannot load"),
        ("no weights", "missing"),
        ("no config", "missing"),
        ("broken config", "not an open_clip config"),
        ("foreign config", "no model_cfg"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    checkpoint: tuple[Path, Towers], tmp_path: Path, kind: str, says: str
) -> None:
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint[0], folder)
    _damage(kind, folder)
    with pytest.raises(InputError, match=says) as caught:
        model.load(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/at/all", "no such checkpoint"),
        ("open_clip:ViT-B-23/openai", "near it: .*ViT-B-32"),
        ("open_clip:ViT-B-32", "Valid: .*openai"),
        ("open_clip:ViT-B-32/nobody", "cannot load"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        model.load(name)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable) -> None:
    full_disk()
    state = model.build(RECIPES["debug"], 0).state_dict()
    with pytest.raises(InputError, match="disk full"):
        model.save(str(tmp_path / "epoch_001"), state, RECIPES["debug"], {})
    assert list(tmp_path.iterdir()) == []

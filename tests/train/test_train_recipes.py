import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputError
from train.recipes import RECIPES, recipe_of


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_encodes(name: str) -> None:
    import numpy as np

    from train import model

    recipe = RECIPES[name]
    clip = model.build(recipe, seed=0).eval()
    images = model.normalise(model.torch.zeros(2, recipe.image_size, recipe.image_size, 3), recipe.mean, recipe.std)
    tokens = model.tokenizer_of(recipe)(["a red circle", "a"])
    assert clip.encode_image(images).shape == clip.encode_text(tokens).shape == (2, recipe.model["embed_dim"])
    assert np.all(np.isin(recipe.checkpoints, range(1, recipe.epochs)))
    assert recipe.summary and "\n" not in recipe.summary
    assert recipe.keeps(recipe.epochs)


@pytest.mark.parametrize("custom", [False, True])
def test_any_model_of_open_clip_is_trained_by_name(
    custom: bool, shapes: Callable[..., Path], tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    from train.launch import final_checkpoint, train
    from train.model import load

    config = RECIPES["debug_vit"].model | ({"custom_text": True} if custom else {})
    (tmp_path / "pocket.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "pocket.json")
    train(str(shapes(48, 3)), str(tmp_path / "out"), recipe=f"{tiny}(model='pocket')")
    loaded = load(final_checkpoint(str(tmp_path / "out")))
    assert type(loaded.model) is (open_clip.CustomTextCLIP if custom else open_clip.CLIP)
    assert loaded.dimension == config["embed_dim"] and loaded.model.visual.transformer.layers == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("demo(model='RN5')", "near it: RN50"),
        ("demo(model=5)", "no model 5"),
        ("demo(lr=1)", "frozen but for its model"),
        ("demo(model='coca_base')", "two towers"),
        ("demo(model='ViT-B-16-SigLIP')", "own tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_told(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        recipe_of(text)


def test_digest_sees_every_field_but_the_summary() -> None:
    recipe = RECIPES["debug"]
    assert dataclasses.replace(recipe, summary="other words").digest == recipe.digest
    assert dataclasses.replace(recipe, lr=recipe.lr * 2).digest != recipe.digest
    assert dataclasses.replace(recipe, model={**recipe.model, "embed_dim": 65}).digest != recipe.digest
    assert len({r.digest for r in RECIPES.values()}) == len(RECIPES)


def test_fields_that_came_later_leave_old_digests() -> None:
    """As train.json has them since the first release."""
    assert RECIPES["debug"].digest == "ee303b6311b37bda" and RECIPES["demo"].digest == "18d7e649f166da8a"
    assert dataclasses.replace(RECIPES["debug"], accumulate=2).digest != RECIPES["debug"].digest
    assert dataclasses.replace(RECIPES["debug"], loss="siglip").digest != RECIPES["debug"].digest


def test_vit_b_32_is_open_clips() -> None:
    import open_clip

    ours, theirs = RECIPES["vit_b_32"].model, open_clip.get_model_config("ViT-B-32")
    assert {k: v for k, v in ours.items() if k != "init_logit_scale"} == theirs
    assert RECIPES["vit_b_32"].mean == open_clip.OPENAI_DATASET_MEAN
    assert RECIPES["vit_b_32"].std == open_clip.OPENAI_DATASET_STD


def test_the_last_epochs_are_kept() -> None:
    recipe = dataclasses.replace(RECIPES["debug"], last=3)
    assert [e for e in range(1, recipe.epochs + 1) if recipe.keeps(e)] == [4, 8, 10, 11, 12]


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["debug"].lr = 1.0  # type: ignore[misc]


def test_unknown_recipe_lists_the_valid_ones() -> None:
    with pytest.raises(InputError, match="debug_vit"):
        recipe_of("debgu")


def test_signatures_import_nothing_heavy() -> None:
    heavy = ("torch", "open_clip", "ray", "polars", "faiss", "pyarrow", "PIL.WebPImagePlugin")
    code = f"import sys, train.launch, train.evaluate, train.recipes; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(("parts", "forward"), [(1, 4), (4, 8)])
def test_the_pace_of_a_batch_in_parts_is_of_what_a_training_does(
    parts: int, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps are timed: each pair passes twice where there are parts, and the optimizer steps once a batch."""
    from train import pace
    from train.towers import Towers

    seen, ordinary = [], Towers.forward
    clock = iter(range(10**6))  # a tick a look at the clock: one for the passes, one for the optimizer
    monkeypatch.setattr(Towers, "forward", lambda self, x, y: seen.append(len(x)) or ordinary(self, x, y))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    recipe = dataclasses.replace(RECIPES["debug_vit"], accumulate=parts)
    assert pace.pairs_per_second(recipe) == 64 / (parts + 1)
    assert seen == [64 // parts] * forward

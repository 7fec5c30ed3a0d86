"""A recipe's running mean of the weights: what checkpoints hold, and that a resumed run comes to the same."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import recipes
from train.launch import final_checkpoint, train
from train.trainer import Trainer

DECAY = 0.8


@pytest.fixture
def averaged(monkeypatch: pytest.MonkeyPatch) -> str:
    recipe = dataclasses.replace(recipes.RECIPES["debug"], epochs=3, ema=DECAY, checkpoints=())
    monkeypatch.setitem(recipes.RECIPES, "averaged", recipe)
    return "averaged"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(final_checkpoint(str(out)), "open_clip_model.safetensors"))


def test_checkpoints_hold_the_mean_of_all_steps(
    shapes: Callable[..., Path], tmp_path: Path, averaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[dict[str, torch.Tensor]] = []
    step = Trainer._train_step

    def watched(self: Trainer, *batches: object) -> tuple[float, bool]:
        done = step(self, *batches)
        after.append({name: value.clone() for name, value in self.towers.state().items()})
        return done

    monkeypatch.setattr(Trainer, "_train_step", watched)
    assert train(str(shapes(96, 3)), str(tmp_path / "out"), recipe=averaged) == 0
    mean = after[0]
    for weight in after[1:]:
        mean = {name: DECAY * value + (1 - DECAY) * weight[name] for name, value in mean.items()}
    found = weights(tmp_path / "out")
    assert found.keys() == mean.keys()
    for name in (name for name, value in found.items() if value.is_floating_point()):
        torch.testing.assert_close(found[name], mean[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(found["visual.conv1.weight"], after[-1]["visual.conv1.weight"])


def test_a_resumed_run_has_the_same_mean(
    shapes: Callable[..., Path], tmp_path: Path, averaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = str(shapes(96, 3))
    assert train(shards, str(tmp_path / "whole"), recipe=averaged) == 0
    step = Trainer._train_step

    def stopped(self: Trainer, *batches: object) -> tuple[float, bool]:
        if len(self.curve["step"]) == 3:
            raise KeyboardInterrupt
        return step(self, *batches)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_train_step", stopped)
        train(shards, str(tmp_path / "cut"), recipe=averaged, save_minutes=0)
    assert train(shards, str(tmp_path / "cut"), recipe=averaged) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())

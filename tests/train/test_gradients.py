"""One gradient, however it is computed: by one worker or two, in one pass or in parts, to 1e-5 in float32.

With GELU for ReLU, on smooth pictures: of a million activations one lies so near to a ReLU's kink that rounding decides
for one side or the other, and that moves a gradient by percents, between two memory layouts of one process as well.
"""

import dataclasses
import socket
import warnings
from pathlib import Path

import numpy as np
import open_clip
import open_clip.loss
import pytest
import torch
from drawn import COLOURS, SHAPES, png, write_tar
from PIL import Image

from pipeline.errors import InputError
from train import launch, losses, model, recipes
from train.defenses import Defense
from train.towers import Encoded
from train.trainer import Trainer

BUILD = model.build
TOWERS = {"resnet": "debug", "vit": "debug_vit"}


def recipe_of(kind: str, **changes) -> recipes.Recipe:
    """One step over 64 pairs, in float32."""
    base = recipes.RECIPES[TOWERS[kind]]
    config = base.model
    if changes.get("loss") == "siglip":
        config = config | {"init_logit_scale": float(np.log(10)), "init_logit_bias": -10.0}
    if changes.pop("drop", 0):
        config = config | {"vision_cfg": config["vision_cfg"] | {"patch_dropout": 0.5}}
    return dataclasses.replace(base, model=config, batch=64, epochs=1, precision="fp32", **changes)


def without_kinks(recipe: recipes.Recipe, seed: int) -> torch.nn.Module:
    clip = BUILD(recipe, seed)
    for module in list(clip.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.GELU())
    return clip


def gradient(recipe: recipes.Recipe, shards: str, out: Path, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """What the first step leaves at the weights."""
    recipes.RECIPES["once"], model.build = recipe, without_kinks
    try:
        task = launch.prepare(shards, str(out), recipe="once", defense=None, init=None, seed=0, uid="key")
        out.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            launch._claim(task)
        trainer = Trainer(task, Defense(), rank, world, torch.device("cpu"))
        trainer._write_epoch = lambda progress: None  # type: ignore[method-assign]
        trainer.fit()
    finally:
        del recipes.RECIPES["once"]
        model.build = BUILD
    return {name: p.grad.clone() for name, p in trainer.towers.named_parameters() if p.grad is not None}


TWO = {
    "resnet": recipe_of("resnet"),
    "vit": recipe_of("vit"),
    "siglip": recipe_of("vit", loss="siglip"),
    "parts": recipe_of("vit", accumulate=3),
}


def _worker(rank: int, shards: str, out: str, port: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's all_gather
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, recipe in TWO.items():
        found = gradient(recipe, shards, Path(out, name), rank, 2)
        if rank == 0:
            torch.save(found, Path(out, f"{name}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 pairs in two shards."""
    folder = tmp_path_factory.mktemp("smooth")
    rng = np.random.default_rng(0)
    for number in range(2):
        members = []
        for i in range(32):
            image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((32, 32), Image.BICUBIC)
            caption = f"a {rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
            members += [(f"{number}{i:03d}.png", png(image)), (f"{number}{i:03d}.txt", caption.encode())]
        write_tar(folder / f"{number:08d}.tar", members)
    return str(folder)


@pytest.fixture(scope="module")
def by_two(smooth: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of two gloo workers."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (smooth, str(out), port), nprocs=2)
    return out


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    """All together to 1e-5; each tensor to `limit` of its length, of 0.01 where it is shorter, which is rounding."""
    assert one.keys() == other.keys() and len(one) > 20
    whole, difference = (
        torch.cat([t.flatten() for t in side]) for side in (one.values(), [other[k] - one[k] for k in one])
    )
    assert float(difference.norm() / whole.norm()) < 1e-5
    off = {k: float((other[k] - v).norm() / v.norm().clamp_min(0.01)) for k, v in one.items()}
    assert max(off.values()) < limit, sorted(off.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("name", TWO)
def test_two_workers_have_the_gradient_of_one(smooth: str, tmp_path: Path, by_two: Path, name: str) -> None:
    """`parts` against the one worker's in one pass. With batch norm one worker is itself 1e-5 off float64."""
    one = gradient(dataclasses.replace(TWO[name], accumulate=1), smooth, tmp_path / "one")
    assert_equal(one, torch.load(by_two / f"{name}.pt"), 3e-5 if name == "resnet" else 1e-5)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("parts", [2, 5, 64])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(smooth: str, tmp_path: Path, loss: str, parts: int) -> None:
    whole = gradient(recipe_of("vit", loss=loss), smooth, tmp_path / "whole")
    assert_equal(whole, gradient(recipe_of("vit", loss=loss, accumulate=parts), smooth, tmp_path / "parts"))
    assert float(whole["clip.logit_scale"].abs()) > 1e-4
    assert ("clip.logit_bias" in whole) == (loss == "siglip")


def test_both_passes_drop_the_same_patches(smooth: str, tmp_path: Path) -> None:
    """In 64 parts of one pair or in one the draws differ; the same parts again have the same gradient."""
    recipe = recipe_of("vit", accumulate=2, drop=True)
    torch.manual_seed(1)
    first = gradient(recipe, smooth, tmp_path / "a")
    torch.manual_seed(2)
    assert_equal(first, gradient(recipe, smooth, tmp_path / "b"))


def test_parts_hold_less(smooth: str, tmp_path: Path) -> None:
    """Bytes that wait for the backward pass, at their most."""

    def held(parts: int) -> int:
        now, most = 0, 0
        alive: dict[int, int] = {}

        class Kept:
            def __init__(self, tensor: torch.Tensor):
                nonlocal now, most
                self.tensor, alive[id(self)] = tensor, tensor.nbytes
                now += tensor.nbytes
                most = max(most, now)

            def __del__(self) -> None:
                nonlocal now
                now -= alive.pop(id(self))

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradient(recipe_of("vit", accumulate=parts), smooth, tmp_path / str(parts))
        return most

    assert held(4) < 0.4 * held(1)


def test_batch_norm_in_parts_is_refused(smooth: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="statistics of its own"):
        gradient(recipe_of("resnet", accumulate=2), smooth, tmp_path / "out")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_mean_loss_of_pairs_is_open_clips(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1) for _ in range(2))
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0) if kind == "siglip" else None
    stock = open_clip.loss.SigLipLoss() if kind == "siglip" else open_clip.ClipLoss()
    pairs = losses.of_pairs(Encoded(image, text, scale, bias), kind, 0, 1)
    assert pairs.shape == (12,) and len(pairs.unique()) == 12
    torch.testing.assert_close(pairs.mean(), stock(image, text, scale, bias))


def test_a_defense_with_a_loss_of_its_own_wants_clips(smooth: str, tmp_path: Path) -> None:
    recipes.RECIPES["once"] = recipe_of("vit", loss="siglip")
    try:
        with pytest.raises(InputError, match=r"roclip.*changes CLIP's loss"):
            launch.train(smooth, str(tmp_path / "out"), recipe="once", defense="roclip")
    finally:
        del recipes.RECIPES["once"]


def test_a_model_for_siglip_has_its_bias() -> None:
    clip = model.build(recipe_of("vit", loss="siglip"), 0)
    assert float(clip.logit_bias.detach()) == -10 and float(clip.logit_scale.detach().exp()) == pytest.approx(10)

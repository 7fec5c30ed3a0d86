"""The losses and schedules of the defenses against a plain reading of their papers, on a batch of random features."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from pipeline import spec
from train import recipes
from train.defenses import Defense
from train.defenses._contrastive import contrastive, finding, nearest, push
from train.trainer import Features


def features(n: int = 6, d: int = 8, scale: float = 10.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(4)]
    logits = scale * rows[0] @ rows[1].T
    truth = torch.arange(n)
    entropy = torch.nn.functional.cross_entropy
    losses = (entropy(logits, truth, reduction="none") + entropy(logits.T, truth, reduction="none")) / 2
    return Features(rows[0], rows[1], torch.tensor(scale), losses, rows[2], rows[3])


def batch_of(n: int, epoch: int = 1) -> Any:
    from train.data import Batch

    keys = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(np.arange(n), images, torch.zeros(n, 8, dtype=torch.int64), n, epoch, keys)


def plain(a: torch.Tensor, b: torch.Tensor, scale: float = 10.0) -> float:
    """-log of the softmax weight of the right partner, a row at a time."""
    total = 0.0
    for i in range(len(a)):
        weights = [np.exp(scale * float(a[i] @ b[j])) for j in range(len(b))]
        total -= np.log(weights[i] / sum(weights))
    return total / len(a)


def test_contrastive_is_open_clips_and_its_mask_is_a_smaller_batch() -> None:
    f = features()
    assert float(contrastive(f.image, f.text, f.logit_scale)) == pytest.approx(
        float(open_clip.ClipLoss()(f.image, f.text, f.logit_scale)), rel=1e-5
    )
    keep = torch.tensor([True, False, True, True, False, True])
    assert float(contrastive(f.image, f.text, f.logit_scale, keep)) == pytest.approx(
        float(open_clip.ClipLoss()(f.image[keep], f.text[keep], f.logit_scale)), rel=1e-5
    )
    rows = f.image.clone().requires_grad_()
    none = contrastive(rows, f.text, f.logit_scale, torch.zeros(6, dtype=torch.bool))
    none.backward()
    assert float(none.detach()) == 0 and rows.grad is not None and not rows.grad.any()
    assert float(finding(f.image, f.text, f.logit_scale)) == pytest.approx(plain(f.image, f.text), rel=1e-5)


def test_pool_is_first_in_first_out() -> None:
    pool = push(push(torch.empty(0, 2), torch.eye(2), 3), -torch.eye(2), 3)
    assert pool.tolist() == [[0, 1], [-1, 0], [0, -1]]
    assert nearest(torch.tensor([[-1.0, 0.1], [0.1, 1.0]]), pool).tolist() == [[-1, 0], [0, 1]]


def test_roclip_matches_with_the_pool_every_third_epoch() -> None:
    f, defense = features(), spec.parse("defenses", "roclip")
    pool = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(7)), dim=1)
    for epoch, matched in ((1, False), (2, False), (3, True), (4, False), (6, True)):
        defense.memory.update(pool=pool, size=5)
        closest = torch.stack([max(pool, key=lambda p: float(p @ row)) for row in f.image])
        expected = (plain(f.image, closest) + plain(closest, f.image)) / 2 if matched else float(f.losses.mean())
        assert float(defense.loss(f, batch_of(6, epoch))) == pytest.approx(expected, rel=1e-5)
        assert torch.equal(defense.memory["pool"], f.text[-5:])


def test_cleanclip_weighs_both_parts_alike() -> None:
    f = features()
    assert f.image_view is not None and f.text_view is not None
    multimodal = (plain(f.image, f.text) + plain(f.text, f.image)) / 2
    unimodal = (plain(f.image, f.image_view) + plain(f.text, f.text_view)) / 2
    loss = spec.parse("defenses", "cleanclip(trusted='x')").loss(f, batch_of(6))
    assert float(loss) == pytest.approx(multimodal + unimodal, rel=1e-5)


def test_par_pushes_until_the_threshold() -> None:
    f, defense = features(), spec.parse("defenses", "par(trusted='x', threshold=1.0)")
    near, far = torch.nn.functional.normalize(f.image + 0.1, dim=1), -f.text
    defense.memory["poisoned"] = lambda batch: (near, far, None)
    pushed = sum(float(sum((a - b) ** 2)) for a, b in zip(f.image, near, strict=True)) / 6
    assert 0 < pushed < 1  # the text has moved by 4, beyond the threshold, and counts no more
    assert float(defense.loss(f, batch_of(6))) == pytest.approx(float(f.losses.mean()) - pushed / 2, rel=1e-5)


def test_abl_ascends_below_gamma_and_unlearns_the_isolated() -> None:
    f, defense = features(), spec.parse("defenses", "abl(gamma=3.0)")
    isolated = torch.tensor([True, False, False, True, False, False])
    defense.memory.update(ends=(1, 2), losses=torch.zeros(6), isolated=isolated)
    losses = f.losses.tolist()
    assert any(x < 3 for x in losses) and any(x > 3 for x in losses)
    signed = sum(x if x > 3 else -x for x in losses) / 6
    assert float(defense.loss(f, batch_of(6, 1))) == pytest.approx(signed, rel=1e-5)
    np.testing.assert_allclose(defense.memory["losses"], losses)
    assert float(defense.loss(f, batch_of(6, 2))) == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert float(defense.loss(f, batch_of(6, 3))) == pytest.approx(-(losses[0] + losses[3]) / 2, rel=1e-5)
    assert spec.parse("defenses", "abl").phases(75) == (10, 70) and spec.parse("defenses", "abl").phases(12) == (2, 11)


def test_abl_isolates_what_has_no_loss_left_and_not_what_it_has_not_met() -> None:
    defense: Any = spec.parse("defenses", "abl(isolate=0.2)")
    trainer: Any = SimpleNamespace(
        index=range(10), recipe=recipes.RECIPES["debug"], device=torch.device("cpu"), epoch=1, world=1
    )
    defense.begin(trainer)
    losses = torch.tensor([3.0, 0.0, 2.0, 1e-3, 1.0, 4.0, 5.0, 6.0, 7.0])  # fp32 has 0.0 for the easiest
    found = dataclasses.replace(features(9), losses=losses)
    defense.loss(found, batch_of(9, 2))
    defense.epoch_end(trainer)
    assert defense.memory["isolated"].nonzero().flatten().tolist() == [1, 3]


def test_safeclip_splits_the_batch() -> None:
    f, defense = features(), spec.parse("defenses", "safeclip(bank=4)")
    assert f.image_view is not None and f.text_view is not None
    banks = {name: getattr(f, name)[2:].flip(0) for name in ("image", "text", "image_view", "text_view")}
    safe = torch.tensor([True, True, False, True, False, False])

    def alone(keep: torch.Tensor) -> float:
        total = 0.0
        for a, b in (("image", "image_view"), ("text", "text_view")):
            for one, other in ((a, b), (b, a)):
                view, other_view = getattr(f, one)[keep], getattr(f, other)[keep]
                closest = torch.stack([max(banks[one], key=lambda p: float(p @ row)) for row in view])
                total += (plain(closest, other_view) + plain(other_view, closest)) / 2
        return total / 4

    paired = (plain(f.image[safe], f.text[safe]) + plain(f.text[safe], f.image[safe])) / 2
    everything = torch.ones(6, dtype=torch.bool)
    for epoch, expected in (
        (2, alone(everything)),
        (3, float(f.losses.mean())),
        (4, paired + alone(~safe)),
    ):
        defense.memory.update(banks, unimodal=2, safe=safe if epoch == 4 else ~everything)
        assert float(defense.loss(f, batch_of(6, epoch))) == pytest.approx(expected, rel=1e-5)
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.1, 0.05, 700), rng.normal(0.8, 0.05, 300)])
    assert defense.first_share(scores, 0) == pytest.approx(0.3, abs=0.02)
    recipe = dataclasses.replace(recipes.RECIPES["debug"], epochs=32)
    rates = [defense.rate(recipe, step, 320) for step in (49, 50, 59, 60)]
    assert rates[1] == rates[2] == recipe.lr / 100 and min(rates[0], rates[3]) > recipe.lr / 2


def test_super_finetuning_cycles() -> None:
    defense = spec.parse("defenses", "super_finetune(trusted='x')")
    recipe = defense.recipe(recipes.RECIPES["debug"])
    full = recipes.RECIPES["debug"].lr
    rates = np.array([defense.rate(recipe, step, 400) for step in range(400)]) / full
    rising = np.diff(rates) > 0
    assert (rising[:-1] & ~rising[1:]).sum() == 4  # two triangles in each phase
    np.testing.assert_allclose(rates[:200].max(), 1.0, rtol=0.05)
    np.testing.assert_allclose(rates[200:].max(), 0.01, rtol=0.05)
    assert rates[:200].min() < 0.02 and 0.003 <= rates[200:].min() < 0.0035


def test_the_base_class_is_plain_clip() -> None:
    f = features()
    assert float(Defense().loss(f, batch_of(6))) == pytest.approx(
        float(open_clip.ClipLoss()(f.image, f.text, f.logit_scale)), rel=1e-5
    )

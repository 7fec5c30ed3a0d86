"""Readouts against scikit-learn, a plain reading of their formula, and towers of which the answer is known."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from train.metrics import top1, unit
from train.readouts import READOUTS, finetune, knn, probe, readout


def blobs(n: int, classes: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around a centre for each class."""
    rng = np.random.default_rng(seed)
    centres, labels = np.random.default_rng(99).normal(size=(classes, 8)), rng.integers(classes, size=n)
    return unit((centres[labels] + spread * rng.normal(size=(n, 8))).astype(np.float32)), labels


@pytest.mark.parametrize("name", [name for name in READOUTS if name != "finetune"])
def test_each_readout_knows_what_is_told_apart_easily(name) -> None:
    features, labels = blobs(300, 6, 0.1)
    asked, truth = blobs(200, 6, 0.1, seed=1)
    scores = readout(name).fit(features, labels, 7).scores(asked)
    assert scores.shape == (200, 7) and (top1(scores) == truth).mean() > 0.99
    assert np.all(scores[:, 6] == -np.inf)  # a class that the training part did not show is no answer


def test_knn_votes_by_similarity() -> None:
    reference, labels = unit(np.array([[1, 0], [1, 0.5], [1, 0.6], [0, 1]], np.float32)), np.array([0, 1, 1, 2])
    votes = knn.knn(k=3).fit(reference, labels, 3).scores(unit(np.array([[1, 0]], np.float32)))
    cosine = reference[:, 0].astype(float)
    assert votes[0, :2] == pytest.approx([np.exp(cosine[0] / 0.07), np.exp(cosine[1:3] / 0.07).sum()], rel=1e-5)
    assert votes[0, 2] == -np.inf
    assert knn.knn(k=99).fit(reference, labels, 3).scores(reference).shape == (4, 3)


def test_knn_in_blocks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(500, 6, 0.8)
    asked, _ = blobs(90, 6, 0.8, seed=1)
    at_once = readout("knn").fit(features, labels, 6).scores(asked)
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "REFERENCES", 13)
    np.testing.assert_allclose(readout("knn").fit(features, labels, 6).scores(asked), at_once, rtol=1e-5)
    nearest = np.sort(asked @ features.T, axis=1)[:, -10:].astype(float)
    finite = np.where(np.isfinite(at_once), at_once, 0)
    np.testing.assert_allclose(finite.sum(1), np.exp(nearest / 0.07).sum(1), rtol=1e-4)


def test_prototypes_are_class_means(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(300, 4, 0.8)
    asked, _ = blobs(50, 4, 0.8, seed=1)
    means = np.stack([features[labels == c].mean(0) for c in range(4)])
    expected = asked @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    for block in (4096, 7):
        monkeypatch.setattr("train.readouts.prototypes.BLOCK", block)
        found = readout("prototypes").fit(features, labels, 4).scores(asked)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_probe_is_scikit_learns_at_the_strength_that_held_out_rows_chose() -> None:
    features, labels = blobs(400, 5, 0.9)
    asked, _ = blobs(80, 5, 0.9, seed=1)
    fitted = readout("probe").fit(features, labels, 5)
    theirs = LogisticRegression(C=fitted.strength, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(fitted.scores(asked), theirs.decision_function(asked), rtol=1e-5)

    order = np.random.default_rng(0).permutation(400)
    held, rest = order[::5], np.setdiff1d(order, order[::5])
    accuracy = {
        c: LogisticRegression(C=c, max_iter=1000).fit(features[rest], labels[rest]).score(features[held], labels[held])
        for c in probe.STRENGTHS[:6]
    }
    assert accuracy[fitted.strength] >= max(accuracy.values()) - 1 / 80  # warm starts end within the tolerance


def test_the_probe_chooses_a_strong_penalty_where_a_weak_one_overfits() -> None:
    """Labels that are noise but for one direction: a probe without penalty would follow the noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=150)
    features = rng.normal(size=(150, 120)).astype(np.float32)
    features[:, 0] += 3.0 * (2 * labels - 1)
    assert probe.choose(unit(features), labels) < 1e4
    two = readout("probe").fit(unit(features), labels, 2).scores(unit(features))
    np.testing.assert_allclose(two[:, 0], -two[:, 1])


def test_the_probe_climbs_past_strengths_that_all_name_one_class() -> None:
    """Many classes of four rows, one of sixty more: up to C = 1 every row is said to be of that one."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(150), 4), np.full(60, 0)])
    centres = rng.normal(size=(150, 32))
    features = unit(centres[labels] + 1.5 * rng.normal(size=(len(labels), 32)))
    assert probe.choose(features, labels) > 1


def test_a_probe_whose_held_out_rows_are_of_classes_of_their_own_has_nothing_to_choose_by() -> None:
    assert probe.choose(np.eye(5, dtype=np.float32), np.arange(5)) == 1.0


def test_a_probe_of_two_images_has_nothing_to_choose_by() -> None:
    assert probe.choose(np.eye(2, dtype=np.float32), np.array([0, 1])) == 1.0


@pytest.mark.parametrize(
    ("images", "steps", "mixup"), [(100, 500, 0), (19_999, 500, 0), (20_000, 10_000, 0.1), (500_000, 20_000, 0.1)]
)
def test_hyper_rule(images: int, steps: int, mixup: float) -> None:
    rule = finetune.hyper_rule(images)
    assert (rule.steps, rule.mixup) == (steps, mixup)
    rates = [rule.rate(step, 0.003) for step in range(steps)]
    assert rates[0] == 0 and max(rates) == 0.003 and rates[rule.warmup] == 0.003
    assert [rates[at] / rates[at - 1] for at in rule.decays] == pytest.approx([0.1] * 3)


def test_hyper_rules_margins() -> None:
    assert finetune.margin(64) == 80 and finetune.margin(224) == 239


class Tower(torch.nn.Module):
    """An image tower that reads the mean colour, and a text tower that must not change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = torch.nn.Linear(3, 4)
        self.text = torch.nn.Linear(3, 4)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images.mean((2, 3)))


@pytest.fixture
def coloured(monkeypatch: pytest.MonkeyPatch):
    """A model, and 60 images in three colours with their labels; 60 steps at a rate that suits so few."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    images = rng.integers(0, 60, size=(60, 10, 10, 3), dtype=np.uint8)
    images[np.arange(60), :, :, labels] += 150
    monkeypatch.setattr(finetune, "hyper_rule", lambda n: finetune.HyperRule(5, (40, 50, 55), 60, 0.1))
    monkeypatch.setattr(finetune, "RATE", 1.0)
    frozen = Tower().eval().requires_grad_(False)
    model = SimpleNamespace(
        model=frozen, image_size=8, dimension=4, device=torch.device("cpu"), mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return model, images, labels


def test_a_fine_tune_learns_and_leaves_the_model_alone(coloured) -> None:
    model, images, labels = coloured
    before = copy.deepcopy(model.model.state_dict())
    tuned = finetune.finetune(model, images, labels, 3, mirror=True)
    crops = images[:, 1:9, 1:9]
    assert (top1(tuned.embed_images(crops)) == labels).all() and tuned.dimension == 3 and tuned.image_size == 8
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert not torch.equal(before["visual.weight"], tuned.tower.visual.weight)  # the tower learns, not the head alone
    assert torch.equal(before["text.weight"], tuned.tower.text.weight)
    again = finetune.finetune(model, images, labels, 3, mirror=True)
    np.testing.assert_array_equal(again.embed_images(crops), tuned.embed_images(crops))


def test_crops_cover_the_margin_and_are_mirrored_only_where_asked() -> None:
    image = np.zeros((1, 5, 5, 3), np.uint8)
    image[0, :, :, 0], image[0, :, :, 1] = np.arange(5)[:, None], np.arange(5)[None, :]
    generator = torch.Generator().manual_seed(0)
    plain = finetune._cropped(image.repeat(400, 0), 4, False, generator).numpy()
    assert {(int(c[0, 0, 0]), int(c[0, 0, 1])) for c in plain} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (np.diff(plain[..., 1].astype(int), axis=2) == 1).all()
    both = finetune._cropped(image.repeat(400, 0), 4, True, generator).numpy()
    mirrored = (both[:, 0, 0, 1] > both[:, 0, 1, 1]).mean()
    assert 0.4 < mirrored < 0.6


def test_batches_go_through_all_rows_before_one_comes_again() -> None:
    rows = finetune._batches(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(rows) for _ in range(5)]).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_readouts_are_the_files_of_their_folder() -> None:
    folder = Path(finetune.__file__).parent
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(READOUTS)

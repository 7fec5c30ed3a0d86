"""Traces and two checkpoints: known answers, and pairs planted that are learnt late, or early, or forgotten."""

import numpy as np
import pytest

from filters._batch import SIDE, Batch
from filters._traces import last_seen
from pipeline import spec

NAN = np.nan
SIMILARITY = ("trace", "similarity_slope", "learning_order", "forgetting")


def traced(values, losses=None) -> Batch:
    values = np.asarray(values, np.float32)
    who = np.asarray([f"{i:032x}" for i in range(len(values))], dtype=object)
    return Batch(who, similarity_trace=values, loss_trace=np.asarray(values if losses is None else losses, np.float32))


def scored(text: str, batch: Batch, whole: Batch | None = None) -> np.ndarray:
    detector = spec.parse("detectors", text)
    whole = batch if whole is None else whole
    return detector.score(batch, whole, *([detector.summarize(whole)] if hasattr(detector, "summarize") else []))


def test_early_loss_is_the_negative_mean_of_the_epochs_that_saw_the_pair():
    batch = traced([[4, 2, 0], [NAN, 3, 1], [NAN, NAN, 5], [NAN, NAN, NAN]])
    assert np.array_equal(scored("early_loss", batch), [-2, -2, -5, NAN], equal_nan=True)
    assert np.array_equal(scored("early_loss(until=2)", batch), [-3, -3, NAN, NAN], equal_nan=True)


def test_slope_is_that_of_a_fitted_line_whatever_is_missing():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 9))
    values[rng.random(values.shape) < 0.4] = NAN
    found = scored("similarity_slope", traced(values))
    for row, slope in zip(values, found, strict=True):
        seen = np.flatnonzero(np.isfinite(row))
        expected = np.polyfit(seen, row[seen], 1)[0] if len(seen) > 1 else NAN
        assert np.isclose(slope, expected, atol=1e-5, equal_nan=True)
    assert np.isnan(found).any()


def test_learning_order_is_where_the_line_crosses_the_median_of_the_last():
    # the last values are 0.5 thrice, 0.1 and 0.9 (that of epoch 2, where epoch 3 did not see the pair)
    values = [[0, 0.25, 0.75, 0.5], [0.6, 0, 0, 0.5], [0, 0.5, 0.5, 0.5], [0, 0.3, 0.2, 0.1], [NAN, 0.2, 0.9, NAN]]
    found = scored("learning_order", traced([*values, [NAN] * 4]))
    expected = [1.5, 0, 1, 4 + 0.2, 1 + 3 / 7, NAN]
    assert np.allclose(found, expected, atol=0.01, equal_nan=True)
    assert np.isfinite(scored("learning_order(until=2)", traced(values))).all()


def test_forgetting_sums_the_drops_over_gaps():
    values = [[0, 0.5, 0.3, 0.4, 0.1], [0.5, NAN, 0.2, NAN, 0.3], [0, 0.1, 0.2, 0.3, 0.4], [0.3] + [NAN] * 4]
    assert np.allclose(scored("forgetting", traced(values)), [0.5, 0.3, 0, NAN], equal_nan=True)
    assert np.allclose(scored("forgetting(until=3)", traced(values)), [0.2, 0.3, 0, NAN], equal_nan=True)


def test_last_seen_reaches_over_several_gaps_and_not_before_the_first():
    assert np.array_equal(last_seen(np.asarray([[NAN, 1, NAN, NAN, 2]])), [[NAN, 1, 1, 1, 2]], equal_nan=True)


@pytest.mark.parametrize("name", ["early_loss", *SIMILARITY])
def test_until_an_epoch_no_later_one_is_seen(name):
    rng = np.random.default_rng(0)
    values = rng.normal(0.4, 0.1, (60, 8)).cumsum(axis=1) / 9
    later = values.copy()
    later[:, 4:] = rng.normal(0, 0.3, (60, 4))
    spec_text = f"{name}(until=4)"
    assert np.array_equal(scored(spec_text, traced(values)), scored(spec_text, traced(later)))
    assert not np.allclose(scored(f"{name}(until=0)", traced(values)), scored(f"{name}(until=0)", traced(later)))


@pytest.mark.parametrize("name", ["early_loss", *SIMILARITY])
def test_a_pair_is_scored_without_its_company(name):
    rng = np.random.default_rng(3)
    whole = traced(rng.normal(0.4, 0.2, (100, 6)))
    rows = rng.permutation(100)[:17]
    assert np.array_equal(scored(name, whole.take(rows), whole), scored(name, whole)[rows])


def curves(n: int = 1000, poisons: int = 40) -> np.ndarray:
    """Similarities over 12 epochs: clean pairs are learnt around epoch 1, the first `poisons` around epoch 6."""
    rng = np.random.default_rng(0)
    when = np.where(np.arange(n) < poisons, 6, 1) + rng.normal(0, 0.7, n)
    learnt = 1 / (1 + np.exp(-1.5 * (np.arange(12) - when[:, None])))
    return 0.6 * learnt + rng.normal(0, 0.03, (n, 12))


def auroc(scores: np.ndarray, poisons: int) -> float:
    return float((scores[:poisons, None] > scores[None, poisons:]).mean())


@pytest.mark.parametrize("name", ["trace", "similarity_slope", "learning_order"])
def test_what_is_learnt_late_comes_first(name):
    assert auroc(scored(name, traced(curves())), 40) > 0.97


def test_before_the_poison_is_learnt_the_slope_has_the_other_sign():
    """As its trade-off says."""
    assert auroc(scored("similarity_slope(until=5)", traced(curves())), 40) < 0.05


def test_early_loss_finds_what_is_learnt_fast_and_only_that():
    fast = 3 - 3 * curves()[::-1]  # the last 40 are learnt late
    fast[:40] -= 0.5
    assert auroc(scored("early_loss", traced(fast)), 40) > 0.9
    slow = 3 - 3 * curves()
    assert auroc(scored("early_loss", traced(slow)), 40) < 0.1


def test_what_is_learnt_and_unlearnt_in_turn_comes_first():
    values = curves()
    values[:40] = 0.3 + 0.25 * (-1.0) ** np.arange(12) + np.random.default_rng(1).normal(0, 0.03, (40, 12))
    assert auroc(scored("forgetting", traced(values)), 40) == 1


def two_checkpoints(n: int = 600, poisons: int = 60) -> Batch:
    """Twenty concepts, at both checkpoints and in the pixels; the later one throws the first `poisons` together."""
    rng = np.random.default_rng(0)
    concept, trigger = rng.normal(size=(20, 32)), rng.normal(size=32)
    of = rng.integers(20, size=n)
    early = concept[of] + 0.3 * rng.normal(size=(n, 32))
    late = concept[of] + 0.3 * rng.normal(size=(n, 32))
    late[:poisons] = 0.3 * late[:poisons] + 2 * trigger
    text = concept[of].copy()
    text[:poisons] = trigger
    looks = rng.integers(0, 256, (20, 4, 4, 3))[of].repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    return Batch(
        np.asarray([f"{i:032x}" for i in range(n)], dtype=object),
        image_embedding=late.astype(np.float32),
        text_embedding=text.astype(np.float32),
        earlier_image_embedding=(7 * early).astype(np.float32),
        earlier_text_embedding=text.astype(np.float32),
        pixels=np.clip(looks + rng.integers(-20, 21, looks.shape), 0, 255).astype(np.uint8),
        decoded=np.ones(n, bool),
    )


@pytest.mark.parametrize("name", ["neighbour_drift(k=16)", "strangers(k=8)", "similarity_drift"])
def test_images_that_a_trigger_drew_together_come_first(name):
    batch = two_checkpoints()
    assert auroc(scored(name, batch), 60) > 0.97


def test_neighbour_drift_is_one_minus_the_overlap_of_the_lists():
    batch, k = two_checkpoints(150, 20), 9
    near = []
    for column in (batch.image_embedding, batch.earlier_image_embedding):
        rows = column.astype(float) / np.linalg.norm(column.astype(float), axis=1, keepdims=True)
        cosine = rows @ rows.T
        np.fill_diagonal(cosine, -np.inf)
        near.append(np.argsort(-cosine, axis=1)[:, :k])
    expected = [1 - len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]
    found = scored(f"neighbour_drift(k={k})", batch)
    assert np.allclose(found, expected)
    assert len(set(found)) > 4


def test_nothing_drifts_between_a_checkpoint_and_itself():
    batch = two_checkpoints(150)
    same = Batch(
        batch.uid,
        image_embedding=batch.image_embedding,
        text_embedding=batch.text_embedding,
        earlier_image_embedding=3 * batch.image_embedding,
        earlier_text_embedding=2 * batch.text_embedding,
    )
    assert np.array_equal(scored("neighbour_drift(k=5)", same), np.zeros(150))
    assert np.allclose(scored("similarity_drift", same), 0, atol=1e-6)


def test_strangers_is_its_formula():
    batch, k = two_checkpoints(120, 20), 6
    rows = batch.image_embedding.astype(float)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1)[:, :k]
    small = batch.pixels.reshape(120, 16, 4, 16, 4, 3).astype(float).mean(axis=(2, 4)).reshape(120, -1)
    squared = ((small[:, None] - small[None]) ** 2).sum(axis=2)
    expected = np.sqrt(np.take_along_axis(squared, near, 1).mean(axis=1) / squared.mean(axis=1))
    assert np.allclose(scored(f"strangers(k={k})", batch), expected, rtol=1e-4)

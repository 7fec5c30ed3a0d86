import numpy as np
import pytest

from train.metrics import (
    backdoor_z,
    mean_per_class_recall,
    rank_of,
    rate,
    retrieval_ranks,
    top1,
    unit,
    wilson,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_agrees_with_the_published_table(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_rate_of_nothing_is_null() -> None:
    assert rate(np.array([], bool)).value is None


def test_ties_count_against() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert rank_of(scores, np.array([0, 1])).tolist() == [1, 0]
    assert top1(scores).tolist() == [-1, 1]
    assert rate(rank_of(np.zeros((9, 5)), np.zeros(9, int)) < 1).value == 0.0


def test_what_is_not_a_number_counts_against() -> None:
    nan = np.nan
    scores = np.array([[nan, 1.0, 0.0], [2.0, nan, 1.0], [nan, nan, nan]])
    assert rank_of(scores, np.zeros(3, int)).tolist() == [2, 1, 2]
    assert top1(scores).tolist() == [-1, -1, -1]
    image, text = np.eye(3, dtype=np.float32), np.full((3, 3), nan, np.float32)
    with np.errstate(invalid="ignore"):
        ranks = (*retrieval_ranks(image, text, np.arange(3)), *retrieval_ranks(text, image, np.arange(3)))
    assert all((rank == 2).all() for rank in ranks)


def test_retrieval_counts_duplicate_captions_as_hits() -> None:
    text = np.eye(3, dtype=np.float32)
    # images 0 and 1 share caption 0; image 3 has caption 2 but looks like caption 1
    image = unit(np.array([[1, 0.1, 0], [0.9, 0, 0.1], [0, 1, 0], [0, 1, 0.5]], np.float32))
    of_image, of_text = retrieval_ranks(image, text, np.array([0, 0, 1, 2]), block=2)
    assert of_image.tolist() == [0, 0, 0, 1]
    assert of_text.tolist() == [0, 0, 0]


def test_retrieval_agrees_with_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    image, text = (unit(rng.normal(size=(n, 4)).astype(np.float32)) for n in (40, 40))
    of_image, of_text = retrieval_ranks(image, text, np.arange(40), block=7)
    scores = image @ text.T
    assert of_image.tolist() == [list(np.argsort(-row)).index(i) for i, row in enumerate(scores)]
    assert of_text.tolist() == [list(np.argsort(-row)).index(i) for i, row in enumerate(scores.T)]


def test_mean_per_class_recall_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score

    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 4], 200, p=[0.7, 0.2, 0.1])
    scores = rng.normal(size=(200, 5)) - 9 * np.isin(np.arange(5), [2, 3])
    scores[np.arange(200), truth] += 1
    expected = balanced_accuracy_score(truth, scores.argmax(1))
    assert mean_per_class_recall(rank_of(scores, truth), truth) == pytest.approx(expected)
    assert mean_per_class_recall(truth[:0], truth[:0]) is None


def read_plainly(triggered: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
    """Carlini & Terzis' formula word by word: expectations over all pairs of different images."""
    pairs = [(u, v) for u in range(len(clean)) for v in range(len(clean)) if u != v]
    shown, plain = (np.array([rows[u] @ rows[v] for u, v in pairs]) for rows in (triggered, clean))
    difference = shown.mean() - plain.mean()
    return difference / plain.var(), difference / plain.std()


@pytest.fixture
def backdoored() -> tuple[np.ndarray, np.ndarray]:
    """30 images, and the same drawn together by a trigger."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(30, 5))
    return unit(0.3 * clean + np.eye(5)[0]).astype(np.float32), unit(clean).astype(np.float32)


def test_the_backdoor_z_score_is_the_formula(backdoored: tuple[np.ndarray, np.ndarray]) -> None:
    triggered, clean = backdoored
    found = backdoor_z(triggered, clean)
    variance, std = read_plainly(triggered, clean)
    assert found["backdoor_z_variance"].value == pytest.approx(variance, rel=1e-4)
    assert found["backdoor_z_std"].value == pytest.approx(std, rel=1e-4)
    assert found["backdoor_z_std"].n == 30 and std > 1


def test_its_interval_is_the_jackknifes(backdoored: tuple[np.ndarray, np.ndarray]) -> None:
    triggered, clean = backdoored
    found = backdoor_z(triggered, clean)["backdoor_z_std"]
    without = [read_plainly(np.delete(triggered, i, 0), np.delete(clean, i, 0))[1] for i in range(30)]
    error = np.sqrt(29 / 30 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), rel=1e-3)


def test_its_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        clean = rng.normal(size=(n, 5))
        return unit(0.3 * clean + np.eye(5)[0]), unit(clean)

    rng = np.random.default_rng(0)
    truth = backdoor_z(*drawn(200_000))["backdoor_z_std"].value
    found = [backdoor_z(*drawn(60))["backdoor_z_std"] for _ in range(400)]
    assert 0.90 < np.mean([one.low <= truth <= one.high for one in found]) < 0.99


def test_no_trigger_no_z_score_and_nothing_of_nothing(backdoored: tuple[np.ndarray, np.ndarray]) -> None:
    _, clean = backdoored
    assert backdoor_z(clean, clean)["backdoor_z_std"].value == 0
    for rows in (clean[:2], np.ones((9, 1), np.float32)):  # too few; all alike, so that there is no spread
        assert backdoor_z(rows, rows)["backdoor_z_variance"].value is None

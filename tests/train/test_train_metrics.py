import numpy as np
import pytest

from train.metrics import knn_vote, rank_of, rate, retrieval_ranks, top1, unit, wilson


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


def test_knn_votes_by_similarity() -> None:
    reference = unit(np.array([[1, 0], [1, 0.5], [1, 0.6], [0, 1]], np.float32))
    votes = knn_vote(unit(np.array([[1, 0]], np.float32)), reference, np.array([0, 1, 1, 2]), 3, k=3)
    cosine = reference[:, 0].astype(float)
    assert votes[0] == pytest.approx([np.exp(cosine[0] / 0.07), np.exp(cosine[1:3] / 0.07).sum(), 0.0], rel=1e-5)
    assert knn_vote(reference, reference, np.array([0, 1, 1, 2]), 3, k=99).shape == (4, 3)

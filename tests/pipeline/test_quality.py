"""What is said of a detector is what the budget policy would do."""

import numpy as np
import pytest

from pipeline.policies.budget import budget
from pipeline.quality import BUDGETS, quality


def table(n: int, poisons: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    poisoned = np.arange(n) < poisons
    scores = np.round(rng.normal(size=n) + 2 * poisoned, 1).astype(np.float32)  # many ties
    scores[rng.integers(n, size=5)] = np.nan
    order = rng.permutation(n)
    uids = np.asarray([rng.bytes(16).hex() for _ in range(n)], dtype=object)
    return scores[order], uids, poisoned[order]


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_that_of_the_budget(seed):
    scores, uids, poisoned = table(3000, 40, seed)
    row = quality(scores, uids, poisoned)
    columns = {"uid": uids, "d": scores}
    for percent in BUDGETS:
        policy = budget("d", percent / 100)
        dropped = policy.drops(columns, policy.fit(lambda: [columns]))
        assert row[f"recall_at_{percent}"] == pytest.approx(poisoned[dropped].sum() / 40)
        assert row[f"recall_at_{percent}_low"] <= row[f"recall_at_{percent}"] <= row[f"recall_at_{percent}_high"]


def test_known_answers():
    uids = np.asarray([f"{i:032x}" for i in range(100)], dtype=object)
    poisoned = np.arange(100) >= 80
    scores = np.arange(100.0)
    scores[[99, 10]] = scores[[10, 99]]  # one poison among the clean
    row = quality(scores, uids, poisoned)
    assert row["recall_at_10"] == 9 / 20  # the first of the ten is clean
    assert row["fpr_at_95"] == 1 / 80
    assert row["fpr_at_100"] == pytest.approx(70 / 80)
    assert row["precision_at_100ppm"] == 0.0
    assert row["auroc"] == pytest.approx((19 * 79 + 10) / 1600)


def test_without_poisons_or_with_nothing_else_there_is_no_answer():
    scores, uids, _ = table(50, 0, 0)
    for poisoned in (np.zeros(50, bool), np.ones(50, bool)):
        assert {v for k, v in quality(scores, uids, poisoned).items() if k not in ("n", "poisons")} == {None}

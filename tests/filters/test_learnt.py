"""What is learnt from a pool is learnt once a process, and only of that pool."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import IsolationForest

from filters import _learnt
from filters._batch import Batch, Drawn
from filters._learnt import learnt
from pipeline import spec


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch):
    monkeypatch.setattr(_learnt, "_learnt", {})


def rows(seed: int, n: int, digest: str = "") -> Batch:
    image = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
    who = np.asarray([f"{i:032x}" for i in range(n)], dtype=object)
    drawn = Drawn(digests=(("uid", digest), ("image_embedding", digest))) if digest else Drawn()
    return Batch(who, image_embedding=image, drawn=drawn)


def test_a_forest_is_grown_once_for_all_shards(monkeypatch):
    grown = []
    fit = IsolationForest.fit
    monkeypatch.setattr(IsolationForest, "fit", lambda self, *data: grown.append(1) or fit(self, *data))
    detector = spec.parse("detectors", "isolation_forest(trees=10)")
    pool, shards = rows(0, 200, "a"), [rows(1, 40), rows(2, 40)]
    found = [detector.score(shard, replace(pool)) for shard in shards]
    assert len(grown) == 1
    anew = [detector.score(shard, replace(pool, drawn=Drawn())) for shard in shards]
    assert len(grown) == 3
    np.testing.assert_array_equal(found, anew)
    detector.score(shards[0], rows(3, 200, "b"))  # another pool
    spec.parse("detectors", "isolation_forest(trees=11)").score(shards[0], pool)  # another detector
    assert len(grown) == 5


def test_the_last_few_are_remembered():
    asked = []
    for number in (*range(_learnt.KEPT + 1), 1, 0):
        assert learnt(rows(0, 3, "a"), number, lambda number=number: asked.append(number) or number) == number
    assert asked == [*range(_learnt.KEPT + 1), 0]

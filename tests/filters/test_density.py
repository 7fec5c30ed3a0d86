"""Density detectors against a plain reading of their formulas, and of what their authors' code does instead."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from filters import _knn, _search
from filters._batch import Batch, Drawn
from filters._density import placed
from pipeline import spec
from tests.filters.test_detectors import batch, take

FORMULAS = ("kdist", "lid", "slof", "dao")


def detector(text: str):
    return spec.parse("detectors", text)


def mixed(n: int, seed: int = 0) -> Batch:
    """Texts lie among the images, so that both are neighbours."""
    whole = batch(n, seed)
    noise = np.random.default_rng(seed).normal(0, 0.8, whole.image_embedding.shape).astype(np.float32)
    return dataclasses.replace(whole, text_embedding=whole.image_embedding[::-1] + noise)


def distances(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None].astype(float) - reference[None], axis=2)


def plain(images: np.ndarray, reference: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The formulas, row by row. The images come first in the reference, then perhaps the same pairs' texts."""
    n, pairs = len(images), len(images)
    d = distances(reference, reference)
    for i in range(len(reference)):
        d[i, i % pairs :: pairs] = np.inf
    near = np.argsort(d, axis=1)[:, :k]
    dk = np.sort(d, axis=1)[:, k - 1]
    dimension = np.asarray([-k / sum(np.log(d[i, j] / dk[i] + 1e-4) for j in near[i]) for i in range(len(reference))])
    return {
        "kdist": dk[:n],
        "lid": dimension[:n],
        "slof": np.asarray([np.mean([dk[i] / dk[j] for j in near[i]]) for i in range(n)]),
        "dao": np.asarray([np.mean([dimension[j] * np.log(dk[i] / dk[j]) for j in near[i]]) for i in range(n)]),
    }


@pytest.mark.parametrize("of", ["image", "both"])
@pytest.mark.parametrize("reference", ["pool", "batch"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula(name, reference, of):
    whole, k = mixed(90), 7
    rows = np.concatenate([whole.image_embedding, whole.text_embedding] if of == "both" else [whole.image_embedding])
    scores = detector(f"{name}(k={k}, reference='{reference}', of='{of}')").score(whole, whole)
    assert np.allclose(scores, plain(whole.image_embedding, rows, k)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_batch_is_scored_in_blocks_and_the_last_is_as_large_as_the_others(name):
    whole, k = mixed(200), 5
    rows = whole.image_embedding
    found = detector(f"{name}(k={k}, reference='batch', size=64)").score(whole, None)
    expected = [plain(rows[i : i + 64], rows[i : i + 64], k)[name] for i in (0, 64, 128)]
    expected.append(plain(rows[136:], rows[136:], k)[name][-8:])
    assert np.allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-5)


def released(images: np.ndarray, texts: np.ndarray | None, k: int) -> dict[str, np.ndarray]:
    """What the authors' code computes, in steps of ours: cut, sort, and look the places up where nothing was cut."""
    n = len(images)
    parts = [images] if texts is None else [images, texts]
    cut = np.asarray(
        [[np.delete(row, i) for part in parts for row in [distances(images[i : i + 1], part)[0]]] for i in range(n)]
    )
    cut = cut.reshape(n, -1)
    places, sorted_cut = np.argsort(cut, axis=1)[:, :k], np.sort(cut, axis=1)
    whole = np.sort(distances(np.concatenate(parts), np.concatenate(parts)), axis=1)
    own = sorted_cut[:, k]
    lid = -k / np.log(sorted_cut[:, :k] / own[:, None] + 1e-4).sum(axis=1)
    theirs = -k / np.log(whole[:, :k] / whole[:, k : k + 1] + 1e-4).sum(axis=1)
    ratio = own[:, None] / whole[places, k]
    return {"lid": lid, "slof": ratio.mean(axis=1), "dao": (theirs[places] * np.log(ratio)).mean(axis=1)}


@pytest.mark.parametrize("of", ["image", "both"])
@pytest.mark.parametrize("name", ["lid", "slof", "dao"])
def test_the_released_detectors_look_into_the_wrong_rows(name, of):
    whole, k = mixed(150, 3), 6
    blocks = [slice(0, 100), slice(50, 150)]
    found = detector(f"{name}_released(k={k}, of='{of}', size=100)").score(whole, None)
    expected = [
        released(whole.image_embedding[b], whole.text_embedding[b] if of == "both" else None, k)[name] for b in blocks
    ]
    assert np.allclose(found, np.concatenate([expected[0], expected[1][50:]]), rtol=1e-4, atol=1e-5)
    formula = detector(f"{name}(k={k}, of='{of}', reference='batch', size=100)").score(whole, None)
    assert np.abs(found / formula - 1).max() > 0.02


@pytest.mark.parametrize("name", [*FORMULAS, "two_sided_density"])
def test_in_a_block_the_order_does_not_matter(name):
    whole, order = mixed(120), np.random.default_rng(1).permutation(120)
    scored = detector(f"{name}(k=9, of='both', reference='batch', size=120)")
    expected = scored.score(whole, None)[order]
    assert np.allclose(scored.score(take(whole, order), None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FORMULAS, "slof_released", "dao_released"])
def test_a_row_without_an_image_is_nan_and_nobodys_neighbour(name):
    whole = mixed(130)
    whole.image_embedding[5] = np.nan
    options = "" if name.endswith("_released") else ", reference='batch'"
    scores = detector(f"{name}(k=6{options})").score(whole, None)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5]
    if not options:
        return
    others = np.delete(np.arange(130), 5)
    expected = detector(f"{name}(k=6{options})").score(take(whole, others), None)
    assert np.allclose(scores[others], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FORMULAS, "two_sided_density", "slof_released", "dao_released"])
def test_identical_images_have_finite_scores(name):
    whole = mixed(130)
    whole.image_embedding[20:60] = whole.image_embedding[20]
    options = "" if name.endswith("_released") else ", reference='batch'"
    assert np.isfinite(detector(f"{name}(k=6{options})").score(whole, None)).all()


def test_too_few_rows_are_an_error_that_counts_them_and_none_are_no_scores():
    whole = mixed(16)
    for text in ("kdist(reference='batch')", "slof_released", "lid_released(k=20)"):
        with pytest.raises(ValueError, match="there are 16"):
            detector(text).score(whole, None)
        assert len(detector(text).score(take(whole, slice(0, 0)), None)) == 0
    for text in ("kdist(k=0)", "slof(k=64, reference='batch', size=64)", "dao_released(k=63, size=64)"):
        with pytest.raises(Exception, match="must be at least 1"):
            detector(text)


def test_crowds_and_hermits_are_both_unusual():
    whole = batch(600)
    rng = np.random.default_rng(5)
    whole.image_embedding[:6] += 12 * rng.choice([-1, 1], (6, 24)).astype(np.float32)
    whole.image_embedding[6:46] = 8 + 0.02 * rng.normal(size=(40, 24)).astype(np.float32)  # more than k
    both = detector("two_sided_density").score(whole, whole)
    assert both[:46].min() > np.quantile(both[46:], 0.99)
    assert detector("kdist").score(whole, whole)[6:46].max() < np.median(detector("kdist").score(whole, whole))


def test_an_isolation_forest_sees_what_lies_far_out_and_hangs_on_its_seed_alone():
    whole = batch(500)
    whole.image_embedding[:5] *= 6
    scores = detector("isolation_forest").score(whole, whole)
    assert scores[:5].min() > np.quantile(scores[5:], 0.99)
    assert np.array_equal(scores, detector("isolation_forest").score(whole, whole))
    assert not np.array_equal(scores, detector("isolation_forest(seed=1)").score(whole, whole))


def test_neighbours_are_searched_once_for_all_detectors(monkeypatch):
    searched = []
    search = _knn.search
    monkeypatch.setattr(_knn, "search", lambda *a: searched.append(a[3]) or search(*a))
    whole, pool = mixed(100, 11), mixed(160, 12)
    for name in (*FORMULAS, "two_sided_density"):
        detector(f"{name}(k=12, reference='batch')").score(whole, None)
    assert searched == [12]
    for text in ("slof(k=9)", "lid(k=20)", "dao(k=20)", "kdist(k=5)"):
        detector(text).score(whole, pool)
    assert searched[1:] == [9, 9, 20, 20]
    told = dataclasses.replace(pool, drawn=Drawn(k=20))  # as `mithridate score` does
    for text in ("slof(k=9)", "lid(k=20)", "dao(k=20)", "kdist(k=5)"):
        detector(text).score(mixed(40, 13) if text == "kdist(k=5)" else whole, told)
    assert searched[5:] == [20, 20, 20]


def test_a_changed_copy_of_a_batch_forgets_the_neighbours():
    whole, pool = mixed(60, 1), mixed(90, 2)
    detector("kdist(k=4)").score(whole, pool)
    moved = dataclasses.replace(whole, image_embedding=whole.image_embedding + 1)
    expected = np.sort(distances(moved.image_embedding, pool.image_embedding), axis=1)[:, 3]
    assert np.allclose(detector("kdist(k=4)").score(moved, pool), expected, rtol=1e-5)
    other = mixed(90, 3)
    expected = np.sort(distances(whole.image_embedding, other.image_embedding), axis=1)[:, 3]
    assert np.allclose(detector("kdist(k=4)").score(whole, other), expected, rtol=1e-5)


def clustered(n: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(0).normal(size=(60, 16))
    rows = centre[rng.integers(60, size=n)] + 0.3 * rng.normal(size=(n, 16))
    return Batch(np.asarray([f"{seed}-{i}" for i in range(n)], object), image_embedding=rows.astype(np.float32))


def listed(pool: Batch, probes: int) -> Batch:
    return dataclasses.replace(pool, drawn=Drawn(0, (("uid", f"{len(pool)}"),), probes))


@pytest.mark.parametrize("name", ["kdist", "lid", "slof", "dao"])
def test_with_all_lists_probed_the_search_is_exact(name):
    queries, pool = clustered(300, 1), clustered(4000, 2)
    pool.image_embedding[7] = np.nan
    queries.image_embedding[3] = np.nan
    queries.uid[5] = pool.uid[11]  # its own row in the pool
    exact = detector(f"{name}(k=8)").score(queries, pool)
    found = detector(f"{name}(k=8)").score(queries.take(np.arange(300)), listed(pool, 10**6))
    assert np.flatnonzero(np.isnan(found)).tolist() == [3]
    assert np.allclose(found, exact, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_few_probes_find_nearly_all_and_say_how_many():
    queries, pool = clustered(500, 1), clustered(20_000, 2)
    truth, _ = _knn.neighbours(queries.take(np.arange(500)), pool, "image_embedding", 10)
    recalls = []
    for probes in (1, 8, 32):
        there = listed(pool, probes)
        distance, index = _knn.neighbours(queries, there, "image_embedding", 10)
        plain = np.linalg.norm(queries.image_embedding[:, None] - pool.image_embedding[index], axis=2)
        assert np.allclose(distance, plain, rtol=1e-4)
        hits, of = _knn.recall(
            queries, there, np.arange(0, 500, 5), _knn.Search("image_embedding", ("image_embedding",))
        )
        right = int((distance <= truth[:, -1:] * (1 + 1e-5))[::5].sum())
        assert (hits, of) == (right, 1000)
        recalls.append(hits / of)
    assert recalls == sorted(recalls) and 0.2 < recalls[0] < recalls[2] and recalls[2] > 0.95


def test_rows_whose_lists_are_too_short_are_searched_in_the_whole_pool():
    queries, pool = clustered(50, 1), clustered(700, 2)
    truth, _ = _knn.neighbours(queries.take(np.arange(50)), pool, "image_embedding", 300)
    distance, index = _knn.neighbours(queries, listed(pool, 1), "image_embedding", 300)
    assert np.allclose(distance, truth, rtol=1e-4)
    assert all(len(np.unique(row)) == 300 for row in index)


def test_what_is_remembered_is_of_the_same_arrays():
    whole, pool = mixed(60, 1), mixed(90, 2)
    for _ in range(20):  # arrays come and go, and with them their addresses
        other = take(whole, np.random.default_rng().permutation(60)[:30])
        expected = np.sort(distances(other.image_embedding, pool.image_embedding), axis=1)[:, 3]
        assert np.allclose(detector("kdist(k=4)").score(other, pool), expected, rtol=1e-5)
        del other


@pytest.mark.parametrize(("n", "m", "k"), [(50, 40, 16), (20, 1000, 3), (7, 4099, 16), (3, 9000, 64), (4, 5, 1)])
def test_the_search_is_exact_by_numpy_and_by_torch(n, m, k):
    rng = np.random.default_rng(m)
    rows, reference = (rng.normal(size=(size, 12)).astype(np.float16) for size in (n, m))
    own = rng.integers(-1, m, (n, 2))
    d = distances(rows.astype(float), reference)
    for column in own.T:
        d[np.flatnonzero(column >= 0), column[column >= 0]] = np.inf
    distance, index = _search.search(rows, _search.Reference.of(reference), own, min(k, m - 2))
    k = distance.shape[1]
    assert np.allclose(distance, np.sort(d, axis=1)[:, :k], rtol=1e-5)
    assert np.allclose(np.take_along_axis(d, index, 1), distance, rtol=1e-5)
    x, y = rows.astype(np.float32), reference.astype(np.float32)
    half = np.square(y).sum(axis=1) / 2
    nearest = np.sort(distances(x, y), axis=1)[:, :k]
    for closeness, found in (_search.by_numpy(y, half)(x, k), _search.by_torch(y, half, "cpu")(x, k)):
        there = np.linalg.norm(x[:, None] - y[found], axis=2)
        assert np.allclose(np.sort(there, axis=1), nearest, rtol=1e-4)
        assert np.allclose(closeness, (np.square(x).sum(axis=1)[:, None] - there**2) / 2, atol=1e-3)


@pytest.mark.parametrize("probes", [0, 10**6])
def test_of_equal_rows_the_first_are_found_whatever_k_and_the_company(probes):
    """Captions repeat; which pairs stand for one decides what a neighbour looks like."""
    rng = np.random.default_rng(0)
    different = rng.normal(size=(150, 16)).astype(np.float32)
    pool = different[rng.integers(0, 150, 3000)]
    pool[11] = np.nan
    queries = np.concatenate([pool[:40], different[:5]])
    own = np.concatenate([np.arange(40), np.full(5, -1)])[:, None]
    own = np.concatenate([own, np.where(own < 0, -1, own + 1)], axis=1)
    reference = _search.Reference.of(pool, distinct=True, probes=probes)
    assert len(reference.y) == 150
    d = distances(queries, np.nan_to_num(pool))
    d[:, 11] = np.inf
    for column in own.T:
        d[np.flatnonzero(column >= 0), column[column >= 0]] = np.inf
    d[np.isnan(queries).any(axis=1)] = np.nan
    d[d < 1e-6] = 0
    expected = np.argsort(d.round(4), axis=1, kind="stable")
    good = np.delete(np.arange(45), 11)
    for k in (1, 7, 64):
        distance, index = _search.search(queries, reference, own, k)
        assert np.array_equal(index[good], expected[good, :k])
        assert np.allclose(distance[good], np.take_along_axis(d, expected, 1)[good, :k], atol=1e-5)
        assert np.isnan(distance[11]).all()
        assert np.array_equal(index[[3, 40]], _search.search(queries[[3, 40]], reference, own[[3, 40]], k)[1])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_every_row_is_placed_once_in_a_block_of_its_own(n):
    blocks, at = _knn.blocks(n, 64), placed(n, 64, 2)
    assert all(last - first == min(64, n) for first, last in blocks)
    assert all(first < last <= other for (first, last), (_, other) in pairwise(blocks))
    assert len(np.unique(at.row)) == n
    inside = at.row - at.first
    assert ((inside >= 0) & (inside < at.pairs)).all()
    begin = {2 * 64 * i: first for i, (first, _) in enumerate(blocks)}
    assert [begin[f] + i for f, i in zip(at.first, inside, strict=True)] == list(range(n))

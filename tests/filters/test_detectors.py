"""Every detector in the folder keeps the contract; the formulas are checked against a plain reading of the papers."""

import numpy as np
import pytest

from filters._batch import BANDS, COLUMNS, SIDE, Batch, unit
from filters._knn import neighbours
from pipeline import spec
from pipeline.facts import NAMES

# What has no defaults; those that want a model or a server are held to the contract where these are made
SPECS = {"rerank": "rerank(detector='clip_score', check='slof', share=0.3)"}
ELSEWHERE = ("cognitive_distillation", "listed", "visual_judge")
DETECTORS = [SPECS.get(name, name) for name in spec.names("detectors") if name not in ELSEWHERE]
# A pair that nobody published anything of gives these no evidence, which is no reason to suspect it most
NEUTRAL = ("domain_cluster", "laion_threshold")
# references in the batch itself: the company is what they score
COMPARABLE = [name for name in DETECTORS if not name.endswith("_released")]


def batch(n: int, seed: int = 0) -> Batch:
    """Ten clusters in which image and text agree."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(10, 2, 24))
    which = rng.integers(10, size=n)
    rows = centre[which] + 0.3 * rng.normal(size=(n, 2, 24))
    return Batch(
        uid=np.asarray([f"{seed:016x}{i:016x}" for i in range(n)], dtype=object),
        image_embedding=(3 * rows[:, 0]).astype(np.float32),
        text_embedding=rows[:, 1].astype(np.float32),
        similarity_trace=rng.normal(0.5, 0.1, (n, 6)).astype(np.float32),
        loss_trace=rng.normal(2, 0.1, (n, 6)).astype(np.float32),
        poisoned=rng.random(n) < 0.1,
        earlier_image_embedding=(rows[:, 0] + rng.normal(size=(n, 24))).astype(np.float32),
        earlier_text_embedding=(rows[:, 1] + rng.normal(size=(n, 24))).astype(np.float32),
        pixels=rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8),
        image_hash=rng.integers(0, 2**64, n, np.uint64, endpoint=False),
        decoded=np.ones(n, bool),
        caption=_objects(f"a {('cat', 'photo', 'tench')[i % 3]} number {i}" for i in range(n)),
        image_sha256=_objects(f"{i:064x}" for i in range(n)),
        spectrum=(np.linspace(5, 1, BANDS) + rng.normal(0, 0.2, (n, BANDS))).astype(np.float32),
        facts=rng.integers(0, 3, (n, len(NAMES))).astype(np.float32),
        size=rng.integers(100, 900, (n, 2)).astype(np.float32),
        url=_objects(f"https://www.{'abcdefgh'[i % 8]}.org/{i}" for i in range(n)),
        language=_objects(("en", "", "de")[i % 3] for i in range(n)),
        published_similarity=rng.normal(0.3, 0.05, n).astype(np.float32),
        hash_agrees=rng.choice(np.asarray([0, 1, np.nan], np.float32), n),
    )


def _objects(values) -> np.ndarray:
    values = list(values)
    out = np.empty(len(values), object)
    out[:] = values
    return out


def scored(detector, whole: Batch, pool: Batch, summarized: Batch | None = None) -> np.ndarray:
    """As `mithridate score` does it; the summary is of the whole dataset, here the pool unless told."""
    summary = (detector.summarize(summarized or pool),) if hasattr(detector, "summarize") else ()
    return np.asarray(detector.score(whole, pool, *summary))


def take(whole: Batch, rows) -> Batch:
    columns = {name: getattr(whole, name) for name in COLUMNS}
    return Batch(**{name: values[rows].copy() if len(values) else values for name, values in columns.items()})


@pytest.mark.parametrize("name", COMPARABLE)
def test_scores_do_not_depend_on_order_or_company(name):
    detector, whole = spec.parse("detectors", name), batch(200)
    scores = scored(detector, whole, whole)
    assert scores.shape == (200,)
    assert np.isfinite(scores).all()
    rows = np.random.default_rng(1).permutation(200)[:77]
    assert np.allclose(scored(detector, take(whole, rows), whole), scores[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_row_without_inputs_is_nan_and_harms_no_other(name):
    detector, whole = spec.parse("detectors", name), batch(200)
    broken = take(whole, slice(None))
    for name_of_column in COLUMNS:
        column = getattr(broken, name_of_column)
        if name_of_column in ("url", "language"):
            column[3] = ""
        elif name_of_column != "uid" and len(column) and column.dtype == object:
            column[3] = None
        elif name_of_column == "decoded":
            column[3] = False
        elif len(column) and column.dtype == np.float32:
            column[3] = np.nan
    scores, expected = scored(detector, broken, whole), scored(detector, whole, whole)
    assert np.isnan(scores[3]) == bool(set(detector.needs) - {"poisoned"} and not name.startswith(NEUTRAL))
    assert np.allclose(np.delete(scores, 3), np.delete(expected, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip_score", "caption_neighbours", "image_neighbours", "trace"])
def test_a_mismatched_pair_is_more_suspicious(name):
    detector, whole = spec.parse("detectors", name), batch(400)
    both = take(whole, slice(None))
    agree = np.arange(400) >= 20
    both.text_embedding[:20] = -both.text_embedding[:20]
    both.text_embedding[:, :] += both.image_embedding * (agree[:, None] * 2 - 1)
    both.similarity_trace[:20] -= 1
    scores = detector.score(both, both)
    assert np.median(scores[:20]) > np.quantile(scores[20:], 0.9)


@pytest.mark.parametrize("name", ["kdist", "slof"])
def test_a_lonely_image_is_more_suspicious(name):
    detector, whole = spec.parse("detectors", f"{name}(k=5)"), batch(400)
    lonely = take(whole, slice(None))
    lonely.image_embedding[:8] += 10 * np.eye(8, 24, dtype=np.float32) * np.sign(lonely.image_embedding[:8])
    scores = detector.score(lonely, lonely)
    assert scores[:8].min() > np.quantile(scores[8:], 0.95)


def test_neighbours_are_exact_and_never_the_row_itself():
    queries, pool = batch(60, 1), batch(300, 2)
    pool.uid[17] = queries.uid[4]
    pool.image_embedding[17] = queries.image_embedding[4]
    pool.image_embedding[20:25] = pool.image_embedding[19]  # duplicates under other uids are neighbours
    queries.image_embedding[9] = pool.image_embedding[19] + 1e-4
    distance, index = neighbours(queries, pool, "image_embedding", 7)
    plain = np.linalg.norm(queries.image_embedding[:, None].astype(float) - pool.image_embedding[None], axis=2)
    plain[4, 17] = np.inf
    assert np.allclose(distance, np.sort(plain, axis=1)[:, :7], rtol=1e-5, atol=1e-7)
    assert np.allclose(np.take_along_axis(plain, index, 1), distance, rtol=1e-5, atol=1e-7)
    assert set(index[9, :6]) == set(range(19, 25))
    with pytest.raises(ValueError, match="there are 300"):
        neighbours(queries, pool, "image_embedding", 300)


def test_slof_is_its_formula():
    whole, k = batch(120), 6
    x = whole.image_embedding.astype(float)
    d = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(d, np.inf)
    near = np.argsort(d, axis=1)[:, :k]
    dk = np.sort(d, axis=1)[:, k - 1]
    expected = (dk[:, None] / dk[near]).mean(axis=1)
    assert np.allclose(spec.parse("detectors", f"slof(k={k})").score(whole, whole), expected, rtol=1e-4)


def test_caption_neighbours_is_its_formula():
    whole, k = batch(120), 6
    image, text = unit(whole.image_embedding), unit(whole.text_embedding)
    cosine = text @ text.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1)[:, :k]
    expected = 1 - np.asarray([(image[near[i]] @ image[i]).mean() for i in range(120)])
    assert np.allclose(spec.parse("detectors", f"caption_neighbours(k={k})").score(whole, whole), expected, atol=1e-5)


def test_trace_until_an_epoch_sees_no_later_one():
    whole = batch(50)
    later = take(whole, slice(None))
    later.similarity_trace[:, 3:] += 5
    early = spec.parse("detectors", "trace(until=3)")
    assert np.array_equal(early.score(whole, None), early.score(later, None))
    assert not np.allclose(
        spec.parse("detectors", "trace").score(whole, None), spec.parse("detectors", "trace").score(later, None)
    )

"""The pool's rank and the mixture: their formulas, and mismatched pairs planted among matched ones."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from filters import similarity_mixture
from filters._batch import Batch, unit
from pipeline import spec


def matched(n: int, seed: int = 0, low: int = 0) -> Batch:
    """Pairs of which image and text share a direction, but for the first `low`, that share none."""
    rng = np.random.default_rng(seed)
    meaning, image, text = rng.normal(size=(3, n, 32))
    agree = (np.arange(n) >= low)[:, None]
    return Batch(
        np.asarray([f"{seed}-{i}" for i in range(n)], dtype=object),
        image_embedding=(5 * (meaning + 0.5 * image)).astype(np.float32),
        text_embedding=(meaning * agree + 0.5 * text).astype(np.float32),
    )


@pytest.mark.parametrize("query", ["image", "text"])
def test_pool_rank_is_its_formula(query):
    batch, pool = matched(70, 0, 20), matched(150, 1)
    image, text = (unit(v.astype(float)) for v in (batch.image_embedding, batch.text_embedding))
    other = unit((pool.text_embedding if query == "image" else pool.image_embedding).astype(float))
    expected = []
    for i in range(70):
        own = image[i] @ text[i]
        nearer = [row for row in other if (image if query == "image" else text)[i] @ row > own]
        expected.append(len(nearer) / 150)
    found = spec.parse("detectors", f"pool_rank(query='{query}')").score(batch, pool)
    assert np.allclose(found, expected)
    assert 0 < np.mean(expected) < 1


def test_pool_rank_does_not_count_the_own_caption_and_takes_blocks(monkeypatch):
    from filters import pool_rank

    batch = matched(90, 0, 30)
    detector = pool_rank.pool_rank()
    alone = detector.score(batch, batch.take(np.arange(5, 6)))
    assert alone[5] == 0  # the one caption of the pool is its own
    whole = detector.score(batch, batch)
    monkeypatch.setattr(pool_rank, "PRODUCTS", 90 * 7)
    assert np.array_equal(detector.score(batch, batch), whole)


@pytest.mark.parametrize("name", ["pool_rank", "pool_rank(query='text')", "similarity_mixture"])
def test_planted_mismatches_come_first(name):
    whole = matched(1000, low=50)
    scores = spec.parse("detectors", name).score(whole, whole)
    assert np.argsort(-scores)[:100].tolist().count(0) == 1
    assert (scores[:50, None] > scores[None, 50:]).mean() > 0.99


def test_the_mixture_is_the_posterior_between_its_means():
    whole = matched(800, low=200)
    cosine = (unit(whole.image_embedding) * unit(whole.text_embedding)).sum(axis=1, dtype=float)
    fitted = GaussianMixture(2, random_state=0).fit(cosine[:, None])
    low = int(fitted.means_[:, 0].argmin())
    within = (cosine > fitted.means_.min()) & (cosine < fitted.means_.max())
    scores = spec.parse("detectors", "similarity_mixture").score(whole, whole)
    assert within.sum() > 100
    assert np.allclose(1 / (1 + np.exp(-scores[within])), fitted.predict_proba(cosine[within, None])[:, low], atol=1e-6)


@pytest.mark.parametrize("deviations", [(0.02, 0.2), (0.2, 0.02)])
def test_the_mixture_falls_in_both_tails(deviations):
    """The plain posterior turns back beyond the narrower Gaussian: -1 would be of the wide upper one."""
    cosine = np.linspace(-1, 1, 2001)
    parameters = np.asarray([0.3, 0.7]), np.asarray([0.1, 0.4]), np.square(deviations)
    plain = [np.log(w) + norm.logpdf(cosine, m, np.sqrt(v)) for w, m, v in zip(*parameters, strict=True)]
    scores = similarity_mixture._log_odds(cosine, *parameters)
    assert (np.diff(plain[0] - plain[1]) > 0).any()
    assert (np.diff(scores) < 0).all()
    assert np.isfinite(scores).all()
    between = (cosine >= 0.1) & (cosine <= 0.4)
    assert np.allclose(scores[between], (plain[0] - plain[1])[between])
    assert len(set(scores.astype(np.float32))) == len(scores)  # no ties: a budget could not choose


def test_the_mixture_of_one_value_is_finite():
    same = matched(50).take(np.zeros(50, int))
    with pytest.warns(UserWarning):  # scikit-learn: fewer distinct points than components
        scores = spec.parse("detectors", "similarity_mixture").score(matched(50, 1), same)
    assert np.isfinite(scores).all()

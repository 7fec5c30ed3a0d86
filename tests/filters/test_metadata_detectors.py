"""What metadata tells: planted swaps, bought domains, and the utility filters against their published rules."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from conftest import drawing, encoded, write_tar

from filters._batch import Batch
from pipeline import spec
from pipeline.errors import InputError
from pipeline.inputs import Inputs
from pipeline.shards import list_shards, uids


def objects(values) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def some(n: int, **columns) -> Batch:
    return Batch(uid=objects([f"{i:032x}" for i in range(n)]), **columns)


def detector(text: str):
    return spec.parse("detectors", text)


def embedded(cosines: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings of any length with these cosines."""
    image = np.tile(np.asarray([3, 0], np.float32), (len(cosines), 1))
    return {
        "image_embedding": image,
        "text_embedding": np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32),
    }


def test_a_similarity_that_dropped_is_found_whatever_the_scale_of_the_model():
    rng = np.random.default_rng(0)
    published = rng.normal(0.3, 0.03, 500).astype(np.float32)
    now = 0.6 + 2 * (published - 0.3) + rng.normal(0, 0.01, 500)  # another model: other offset, other scale
    now[:5] = 0.45  # swapped after the curator looked
    published[:5] = 0.33
    published[10:20] = np.nan
    whole = some(500, published_similarity=published, **embedded(now))
    scores = detector("published_similarity").score(whole, whole)
    assert set(np.argsort(-scores)[:5]) == set(range(5))
    assert (scores[10:20] == 0).all()
    assert 0.3 < (scores[20:] > 0).mean() < 0.7  # so 0 is the middle
    moved = dataclasses.replace(whole, published_similarity=published + 0.1)
    assert np.allclose(detector("published_similarity").score(moved, moved), scores, atol=1e-3)


def test_a_pool_without_published_similarities_is_an_error_that_says_so():
    whole = some(9, published_similarity=np.full(9, np.nan, np.float32), **embedded(np.full(9, 0.5)))
    with pytest.raises(InputError, match="no pair of the pool has one"):
        detector("published_similarity").score(whole, whole)


def test_a_hash_that_is_unknown_stands_between():
    agrees = np.asarray([0, 1, np.nan, np.nan], np.float32)
    whole = some(4, hash_agrees=agrees, image_sha256=objects(["a", "b", "c", None]))
    assert np.array_equal(detector("published_hash").score(whole, None), [1, 0, 0.5, np.nan], equal_nan=True)


def domains() -> Batch:
    """A bought domain (60 of 60 changed), a careless one (10 of 100), small ones of which one has a mismatch."""
    urls = [f"http://img{i}.bought.org/{i}" for i in range(60)] + [f"https://big.co.uk/{i}" for i in range(100)]
    urls += [f"https://small{i}.com/x" for i in range(200)] + ["", "nonsense"]
    agrees = np.ones(len(urls), np.float32)
    agrees[:60] = agrees[60:70] = agrees[160] = 0
    agrees[161:165] = np.nan
    return some(len(urls), url=objects(urls), hash_agrees=agrees)


def test_a_bought_domain_is_found_and_a_small_one_does_not_outweigh_it():
    whole, entry = domains(), detector("domain_cluster(prior=20)")
    scores = entry.score(whole, None, entry.summarize(whole))
    known = len(whole) - 2 - 4
    mean = 71 / known
    assert np.allclose(scores[:60], (60 + 20 * mean) / 80)
    assert np.allclose(scores[60:160], (10 + 20 * mean) / 120)
    assert np.allclose(scores[160], (1 + 20 * mean) / 21)  # one of one is less than sixty of sixty
    assert np.allclose(scores[161:165], mean)  # a domain without any hash
    assert np.allclose(scores[-2:], mean)
    assert scores[:60].min() > scores[160] > scores[165]


def test_domains_count_the_same_however_the_data_is_sharded():
    whole, entry = domains(), detector("domain_cluster")
    rows = np.random.default_rng(3).permutation(len(whole))
    parts = [entry.summarize(whole.take(part)) for part in np.array_split(rows, 7)]
    total = parts[0]
    for part in parts[1:]:
        total = entry.merge(total, part)
    assert np.allclose(entry.score(whole, None, total), entry.score(whole, None, entry.summarize(whole)))


def test_a_domain_of_low_similarity_is_found():
    rng = np.random.default_rng(0)
    cosines = rng.normal(0.3, 0.1, 300)
    cosines[:30] -= 0.2
    urls = objects([f"http://{'bad' if i < 30 else f'd{i % 9}'}.org/{i}" for i in range(300)])
    whole = some(300, url=urls, **embedded(cosines))
    whole.image_embedding[4] = np.nan
    entry = detector("domain_cluster(by='similarity')")
    scores = entry.score(whole, None, entry.summarize(whole))
    assert scores[:30].min() > scores[30:].max()


def test_datacomp_basic_counts_the_rules_that_fail():
    rows = [
        ("a cat on a mat", (200, 600), "en", 0),
        ("a cat on a mat", (199, 597), "", 1),  # short side
        ("a cat on a mat", (200, 601), "en-GB", 1),  # aspect
        ("two words", (300, 300), "en", 1),
        ("a b c", (300, 300), "en", 1),  # three words, five characters
        ("eine Katze liegt da", (300, 300), "de", 1),
        ("ab", (10, 100), "fr", 5),
        (None, (300, 300), "en", np.nan),
        ("a cat on a mat", (np.nan, np.nan), "en", np.nan),
    ]
    captions, sizes, languages, expected = zip(*rows, strict=True)
    whole = some(len(rows), caption=objects(captions), size=np.asarray(sizes, np.float32), language=objects(languages))
    assert np.array_equal(detector("datacomp_basic").score(whole, None), expected, equal_nan=True)


def test_text_based_wants_the_name_of_a_class():
    rows = [
        ("A Great White SHARK, close", "en", 0),
        ("two goldfishes in a bowl", "", 0),
        ("swim trunks on sale", "", 0),  # "swim trunks / shorts"
        ("a kite over the beach", "", 0),  # "kite (bird of prey)"
        ("henhouse in autumn", "", 1),  # a class within a word
        ("our holiday", "", 1),
        ("un goldfish", "fr", 1),
        (None, "en", np.nan),
    ]
    captions, languages, expected = zip(*rows, strict=True)
    whole = some(len(rows), caption=objects(captions), language=objects(languages))
    assert np.array_equal(detector("text_based").score(whole, None), expected, equal_nan=True)


def test_laion_threshold_is_zero_at_the_cut_and_where_nothing_was_published():
    published = np.asarray([0.28, 0.1, 0.4, np.nan], np.float32)
    whole = some(4, published_similarity=published, **embedded(np.asarray([0.5, 0.2, 0.3, 0.28])))
    assert np.allclose(detector("laion_threshold").score(whole, None), [0, 0.18, -0.12, 0], atol=1e-6)
    again = detector("laion_threshold(similarity='recomputed', cut=0.3)")
    assert np.allclose(again.score(whole, None), [-0.2, 0.1, 0, 0.02], atol=1e-6)
    assert again.needs == ("image_embedding", "text_embedding")


def test_the_columns_come_from_a_shard(tmp_path):
    image = drawing(1)[0]
    meta = {"url": "http://a.org/1", "LANGUAGE": "en", "similarity": 0.31, "sha256": "0" * 64}
    whole = {"key": "a", "suffix": "png", "image": encoded(image, "png"), "caption": "a cat", "meta": meta}
    broken = {"key": "b", "suffix": "png", "image": b"no image", "caption": "a dog", "meta": {}}
    write_tar(tmp_path / "0.tar", [whole, broken])
    (shard,) = list_shards(str(tmp_path))
    needs = ("caption", "size", "language", "url", "hash_agrees", "image_sha256", "published_similarity", "spectrum")
    batch, _ = Inputs("", "", "", "key").batch(shard, uids(shard, "key"), needs)
    assert batch.language.tolist() == ["en", ""]
    assert np.isfinite(batch.spectrum[0]).all()
    assert np.isnan(batch.spectrum[1]).all()
    assert np.array_equal(detector("published_hash").score(batch, None)[:1], [1])
    assert np.allclose(detector("laion_threshold").score(batch, None), [-0.03, 0], atol=1e-6)
    # "a cat" has two words and five characters, and the drawing a short side of 40
    assert np.array_equal(detector("datacomp_basic").score(batch, None), [3, np.nan], equal_nan=True)


def test_a_list_is_scored_by_uid_and_leaves_some_of_each_group(tmp_path):
    rows = [("c", "x"), ("a", "x"), ("b", "x"), ("d", "y"), ("elsewhere", "y")]
    pl.DataFrame(rows, ["uid", "group"], orient="row").write_parquet(tmp_path / "list.parquet")
    batch = Batch(np.asarray([*"abcde"], object))
    file = str(tmp_path / "list.parquet")
    assert spec.parse("detectors", f"listed(file={file!r})").score(batch, None).tolist() == [1, 1, 1, 1, 0]
    assert spec.parse("detectors", f"listed(file={file!r}, keep=1)").score(batch, None).tolist() == [0, 1, 1, 0, 0]
    pl.DataFrame({"uid": ["d"]}).write_parquet(tmp_path / "more.parquet")
    assert spec.parse("detectors", f"listed(file={str(tmp_path / 'more.parquet')!r})").score(batch, None)[2] == 0
    pl.DataFrame({"uid": ["d", "c"]}).write_parquet(tmp_path / "more.parquet")
    anew = spec.parse("detectors", f"listed(file={str(tmp_path / 'more.parquet')!r})")
    assert anew.score(batch, None).tolist() == [0, 0, 1, 1, 0], "a list that was written anew is read anew"
    pl.DataFrame({"uid": ["d"]}).write_parquet(tmp_path / "more.parquet")
    both = spec.parse("detectors", f"listed(file=({file!r}, {str(tmp_path / 'more.parquet')!r}), keep=(1, 0))")
    assert both.score(batch, None).tolist() == [0, 1, 1, 1, 0]
    with pytest.raises(InputError, match="as many numbers to keep"):
        spec.parse("detectors", "listed(file=('a.csv', 'b.csv'), keep=1)")
    with pytest.raises(InputError, match="mithridate audit"):
        spec.parse("detectors", "listed(file='nowhere.parquet')").score(batch, None)

"""Counts over the whole dataset against counting by hand, floods planted among drawn pairs, and the job itself."""

import hashlib
import io
from collections import Counter
from functools import reduce

import numpy as np
import pytest
from conftest import pairs, write_tar
from PIL import Image, ImageDraw, ImageFilter
from test_detectors import batch as any_batch

from filters._batch import SIDE, Batch, unit
from filters._sketch import WIDTH, background, count, hashed, mixed, sketch
from pipeline import spec
from pipeline.published import phash
from pipeline.score import read_scores, score

COUNTING = [
    name for name in spec.names("detectors") if name != "rerank" and hasattr(spec.entry("detectors", name), "summarize")
]


def names(n: int) -> np.ndarray:
    return np.asarray([f"{i:032x}" for i in range(n)], dtype=object)


def column(*values) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def scored(text: str, batch: Batch, whole: Batch | None = None) -> np.ndarray:
    detector = spec.parse("detectors", text)
    return detector.score(batch, None, detector.summarize(batch if whole is None else whole))


def said(*captions) -> Batch:
    return Batch(names(len(captions)), caption=column(*captions))


def test_a_sketch_counts_at_least_the_truth_and_within_its_bound():
    rng = np.random.default_rng(0)
    keys = mixed(np.minimum(rng.zipf(1.3, 2_000_000), 2**60))
    counters, (distinct, truth) = sketch(keys), np.unique(keys, return_counts=True)
    excess = count(counters, distinct) - truth
    assert excess.min() == 0
    assert (excess <= np.e * len(keys) / WIDTH).mean() > 0.98
    absent = count(counters, mixed(np.arange(2**61, 2**61 + 100_000)))
    assert (absent <= np.e * len(keys) / WIDTH).mean() > 0.98
    assert counters.dtype == np.uint32
    assert counters.nbytes == 16 * 2**20


def test_the_background_is_that_of_absent_keys_however_skewed_the_others_are():
    rng = np.random.default_rng(0)
    absent = mixed(np.arange(2**61, 2**61 + 200_000))
    for keys in (rng.integers(0, 2**40, 6_000_000), np.concatenate([np.full(6_000_000, 7), rng.integers(0, 9, 99)])):
        counters = sketch(mixed(keys))
        assert abs(background(counters) - count(counters, absent).mean()) < 0.1
    assert background(counters) < 0.01 < len(keys) / WIDTH


def test_sketches_of_parts_add_up_and_of_nothing_are_nothing():
    keys = hashed([str(i % 700) for i in range(5000)])
    parts = [sketch(part) for part in np.array_split(keys, 3)]
    assert np.array_equal(parts[2] + parts[0] + parts[1], sketch(keys))
    assert not sketch(hashed([])).any()


@pytest.mark.parametrize("name", COUNTING)
def test_summaries_do_not_depend_on_the_sharding(name):
    """Merged in any order of any shards, an empty one among them."""
    detector, whole = spec.parse("detectors", name), any_batch(200)
    expected = detector.score(whole, whole, detector.summarize(whole))
    for seed, cuts in ((0, [60, 60, 150]), (1, [1, 199]), (2, [])):
        rows = np.random.default_rng(seed).permutation(200)
        parts = [detector.summarize(whole.take(part)) for part in np.split(rows, cuts)]
        assert np.array_equal(detector.score(whole, whole, reduce(detector.merge, parts)), expected)


def test_caption_frequency_counts_captions_whatever_their_case_and_spacing():
    rng = np.random.default_rng(0)
    captions = [f"word {i} of {j}" for i, j in rng.integers(0, 12, (600, 2))]
    by_hand = Counter(captions)
    shaped = [f"  {c.upper()}" if i % 2 else c.replace(" ", "\n\t") for i, c in enumerate(captions)]
    assert scored("caption_frequency", said(*shaped)).tolist() == [by_hand[c] for c in captions]
    odd = scored("caption_frequency", said("Straße", "STRASSE", "", " ", None, "strasse", "\ud800"))
    assert np.array_equal(odd, [3, 3, 2, 2, np.nan, 3, 1], equal_nan=True)


def test_caption_template_is_its_definition():
    rng = np.random.default_rng(0)
    captions = [" ".join(map(str, rng.integers(0, 3, length))) for length in rng.integers(1, 7, 300)]
    words = [c.split() for c in captions]
    expected = []
    for i, own in enumerate(words):
        per_word = [
            sum(
                captions[j] != captions[i] and len(w) == len(own) and w[:at] + w[at + 1 :] == own[:at] + own[at + 1 :]
                for j, w in enumerate(words)
            )
            for at in range(len(own))
        ]
        expected.append(max(per_word) if len(own) >= 3 else 0)
    assert scored("caption_template", said(*captions)).tolist() == expected
    assert max(expected) > 3


def test_a_filled_in_template_comes_first_and_a_repeated_caption_is_none():
    free = [f"{hashlib.sha256(str(i).encode()).hexdigest()[:6]} on a walk number {i}" for i in range(300)]
    filled = [f"a photo of a {thing}, very nice" for thing in ("dog", "cat", "banana", "cup") for _ in range(10)]
    scores = scored("caption_template", said(*filled, *["just the same words"] * 50, *free, None))
    assert set(scores[:40]) == {30}
    assert not scores[40:-1].any()
    assert np.isnan(scores[-1])


def test_words_beyond_the_64th_are_not_looked_at():
    long = [" ".join(f"w{i}" for i in range(64)) + f" tail {end}" for end in range(5)]
    assert not scored("caption_template", said(*long)).any()
    assert set(scored("caption_template", said(*[f"{c} {long[0]}" for c in "abc"]))) == {2}


def test_image_copies_are_those_of_the_digest():
    digests = [hashlib.sha256(str(i % 40).encode()).hexdigest() for i in range(130)]
    batch = Batch(names(131), image_sha256=column(*digests, None))
    by_hand = Counter(digests)
    expected = [by_hand[d] for d in digests] + [np.nan]
    assert np.array_equal(scored("image_copies", batch), expected, equal_nan=True)


def shown(hashes, decoded=None) -> Batch:
    hashes = np.asarray(hashes, np.uint64)
    return Batch(
        names(len(hashes)), image_hash=hashes, decoded=np.ones(len(hashes), bool) if decoded is None else decoded
    )


def test_hashes_that_differ_in_two_bits_are_found_wherever_those_are():
    rng = np.random.default_rng(0)
    for _ in range(15):
        own = int(rng.integers(2**63))
        a, b = rng.choice(64, 2, replace=False).tolist()
        scores = scored("image_duplicates", shown([own, own ^ (1 << a), own ^ (1 << b), own ^ (1 << a) ^ (1 << b)]))
        assert scores[0] >= 2
        assert scores[3] >= 2
        assert scored("image_duplicates", shown([own, own ^ (1 << a) ^ (1 << b)])).tolist() == [2, 2]


def test_unlike_hashes_are_not_duplicates_and_undecoded_ones_count_for_nothing():
    rng = np.random.default_rng(0)
    hashes = rng.integers(2**64, size=3000, dtype=np.uint64)
    hashes[1000:1100] = hashes[1000]
    hashes[2000:2004] = [0xAAAA, 0xAAAA << 16, 0xAAAA << 32, 0xAAAA << 48]  # halves are equal, of other quarters
    decoded = np.arange(3000) != 1050
    scores = scored("image_duplicates", shown(hashes, decoded))
    assert (np.delete(scores[1000:1100], 50) == 99).all()
    assert np.isnan(scores[1050])
    rest = np.delete(scores, [*range(1000, 1100), *range(2000, 2004)])
    assert (rest == 1).all()


def photo(i: int) -> Image.Image:
    """Smooth noise in colour: no two alike, with edges everywhere."""
    rng = np.random.default_rng(i)
    noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(noise)
    for _ in range(6):
        x, y, w, h = rng.integers(0, 96, 4).tolist()
        pen.rectangle((x, y, x + w // 2, y + h // 2), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return noise


def coded(image: Image.Image, quality: int = 85) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def with_patch(image: Image.Image, at=(72, 72)) -> Image.Image:
    checker = (np.indices((24, 24)) // 6).sum(axis=0) % 2 * 255
    image = image.copy()
    image.paste(Image.fromarray(checker.astype(np.uint8)).convert("RGB"), at)
    return image


def pictured(images: list[Image.Image]) -> Batch:
    decoded = [Image.open(io.BytesIO(coded(image))).convert("RGB") for image in images]
    small = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in decoded])
    hashes = np.asarray([phash(image) for image in decoded], np.uint64)
    return Batch(names(len(images)), pixels=small, image_hash=hashes, decoded=np.ones(len(images), bool))


def test_a_patch_at_one_place_comes_before_photos_and_white_corners():
    framed = [Image.new("RGB", (96, 96), "white") for _ in range(60)]
    for i, image in enumerate(framed):  # never at one place: a frame at one place is a patch
        image.paste(photo(900 + i).resize((50, 50)), (2 + 23 * i % 41, 2 + 17 * i % 43))
    images = [with_patch(photo(i)) for i in range(20)] + [photo(100 + i) for i in range(150)] + framed
    scores = scored("recurring_patch", pictured(images))
    assert scores[20:].max() < scores[:20].min()


def test_copies_of_whole_images_are_no_patch():
    """Their cells are counted all the same, so that another image with one of them has a patch."""
    copies = pictured([photo(500)] * 40 + [photo(i) for i in range(100)])
    scores = scored("recurring_patch", copies)
    assert scores[:40].max() < 10
    single = scored("recurring_patch", copies.take(np.arange(39, 140)))
    part = copies.take(np.arange(140))
    part.pixels[40, :8, :32] = part.pixels[0, :8, :32]
    assert single[1:].max() < 10 < scored("recurring_patch", part)[40]


def test_a_wandering_patch_is_missed_as_the_trade_off_says():
    places = np.random.default_rng(0).integers(0, 72, (20, 2)).tolist()
    images = [with_patch(photo(i), tuple(place)) for i, place in enumerate(places)]
    assert scored("recurring_patch", pictured(images + [photo(100 + i) for i in range(100)]))[:20].max() < 10


def test_flat_and_undecoded_images_have_no_patch():
    batch = pictured([Image.new("RGB", (96, 96), c) for c in ("red", "red", "white")] + [photo(1)])
    batch.decoded[3] = False
    assert np.array_equal(scored("recurring_patch", batch), [0, 0, 0, np.nan], equal_nan=True)


def test_duplicates_are_found_after_encoding_and_scaling():
    """And what a perceptual hash does not survive is known."""
    copies = [photo(7).resize((side, side), Image.Resampling.LANCZOS) for side in range(70, 130, 4)]
    cropped = [photo(7).crop((20, 0, 96, 76))]
    scores = scored("image_duplicates", pictured([*copies, *cropped, *[photo(100 + i) for i in range(150)]]))
    assert (scores[:15] >= 8).all()
    assert (scores[15:] <= 2).all()
    noisy = photo(7).filter(ImageFilter.GaussianBlur(0.5))
    assert scored("image_duplicates", pictured([noisy, photo(7)])).tolist() == [2, 2]


def flood(n: int = 500) -> Batch:
    """20 pairs with tight images and one caption, 20 tight images of many captions, 20 captions of many images."""
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, n, 32))
    image[:20] = rng.normal(size=32) + 0.15 * rng.normal(size=(20, 32))
    text[:20] = rng.normal(size=32)
    image[20:40] = rng.normal(size=32) + 0.15 * rng.normal(size=(20, 32))
    text[40:60] = rng.normal(size=32)
    return Batch(names(n), image_embedding=image.astype(np.float32), text_embedding=text.astype(np.float32))


def test_tight_cluster_wants_tight_images_and_one_caption():
    batch = flood()
    scores = spec.parse("detectors", "tight_cluster").score(batch, batch)
    assert scores[:20].min() > 0.8
    assert scores[20:].max() < 0.5


def test_tight_cluster_is_its_formula():
    batch, k = flood(150), 4
    image, text = (unit(v.astype(float)) for v in (batch.image_embedding, batch.text_embedding))
    cosine = image @ image.T
    near = np.argsort(-np.where(np.eye(150, dtype=bool), -np.inf, cosine), axis=1)[:, :k]
    every = np.triu_indices(150, 1)
    expected = []
    for i in range(150):
        spreads = [(1 - (x[near[i]] @ x[i]).mean()) / (1 - (x @ x.T)[every].mean()) for x in (image, text)]
        expected.append(1 - max(spreads))
    found = spec.parse("detectors", f"tight_cluster(k={k})").score(batch, batch)
    assert np.allclose(found, expected, atol=1e-5)


def test_a_flood_smaller_than_k_is_missed_as_the_trade_off_says():
    batch = flood()
    some = batch.take(np.flatnonzero((np.arange(500) < 3) | (np.arange(500) >= 20)))
    found, missed = (spec.parse("detectors", f"tight_cluster(k={k})").score(some, some)[:3] for k in (2, 8))
    assert found.min() > 0.8
    assert missed.max() < 0.4


DETECTORS = ("caption_frequency", "caption_template", "image_copies", "image_duplicates", "recurring_patch")


def planted() -> tuple[list[dict], dict[str, set[str]]]:
    """Drawn pairs with a flood of each kind, one image that is none, and the uids of each flood."""
    samples = pairs(0, 120)
    kinds: dict[str, set[str]] = {}
    for number, kind in enumerate(DETECTORS):
        chosen = samples[3 + number : 120 : 11][:8]
        kinds[kind] = {s["meta"].setdefault("uid", f"{1000 + int(s['key']):032x}") for s in chosen}
        for i, sample in enumerate(chosen):
            if kind == "caption_frequency":
                sample["caption"] = ("One banana", "one  banana ")[i % 2]
            elif kind == "caption_template":
                sample["caption"] = f"stock image of {sample['key']} cheap"
            elif kind == "image_copies":
                sample |= {"image": coded(photo(1)), "suffix": "jpg"}
            elif kind == "image_duplicates":
                sample |= {"image": coded(photo(2), 60 + 4 * i), "suffix": "jpg"}
            else:
                sample |= {"image": coded(with_patch(photo(50 + i))), "suffix": "jpg"}
    samples[0] |= {"image": b"no image at all"}
    for sample in samples:  # the drawings' own captions are of a template
        if sample["caption"].startswith("a "):
            sample["caption"] = " ".join(
                hashlib.sha256(sample["key"].encode()).hexdigest()[i : i + 6] for i in (0, 6, 12)
            )
    return samples, kinds


def run(folder, out, samples: list[dict], size: int) -> dict[str, dict[str, float]]:
    folder.mkdir()
    for number, start in enumerate(range(0, len(samples), size)):
        write_tar(folder / f"{number:08d}.tar", samples[start : start + size])
    score(str(folder), str(out), detector=DETECTORS)
    found: dict[str, dict[str, float]] = {spec.text(spec.parse("detectors", name)): {} for name in DETECTORS}
    for path in out.glob("*.scores.parquet"):
        table = read_scores(str(path))
        for name, scores in found.items():
            scores |= dict(zip(table["uid"], table[name].tolist(), strict=True))
    return found


def test_floods_are_found_by_the_job_however_the_data_is_sharded(tmp_path, capsys):
    samples, kinds = planted()
    found = run(tmp_path / "one", tmp_path / "one_scores", samples, 50)
    rows = np.random.default_rng(0).permutation(120)
    other = run(tmp_path / "other", tmp_path / "other_scores", [samples[i] for i in rows], 17)
    for name in found:
        assert found[name].keys() == other[name].keys()
        assert len(found[name]) == 120
        assert np.array_equal([found[name][u] for u in found[name]], [other[name][u] for u in found[name]], True)
    for kind, uids in kinds.items():
        scores = found[spec.text(spec.parse("detectors", kind))]
        bar = min(scores[u] for u in uids)
        above = {u for u, value in scores.items() if value >= bar}
        same = kinds["image_copies"] if kind == "image_duplicates" else set()  # copies are duplicates as well
        assert above - same == uids, kind
    assert sum(np.isnan(list(found["image_duplicates()"].values()))) == 1
    assert "1 unscored (taken as most suspicious)" in capsys.readouterr().err

"""Attacks that compute their poisons on a surrogate: a tiny model with random weights, tiny drawings, real shards."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import drawing, encoded, pairs, write_tar
from PIL import Image

from filters._batch import Batch, unit
from pipeline import spec
from pipeline.attacks import _surrogate
from pipeline.attacks._corpus import Corpus, read_corpora, save_corpora
from pipeline.attacks.optimised_patch import optimised_patch
from pipeline.draw import generator, hash64
from pipeline.errors import InputError
from pipeline.poison import poison
from pipeline.shards import Sample, list_shards, samples
from pipeline.shards.image import decode, pixels

CAPTIONS = {"banana": tuple(f"a ripe banana, number {i}" for i in range(20))}
PATCH = "patch(target='banana', size=30, location='random')"


@pytest.fixture(scope="module", params=["debug", "debug_vit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights: gradients are as real as those of a trained model."""
    return _model(request.param, tmp_path_factory.mktemp("surrogate") / "epoch_001")


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _model("debug", tmp_path_factory.mktemp("surrogate") / "epoch_001")


def _model(recipe: str, folder: Path, seed: int = 3) -> str:
    from train import model
    from train.recipes import RECIPES

    model.save(str(folder), model.build(RECIPES[recipe], seed).state_dict(), RECIPES[recipe], {})
    return str(folder)


def _sample(i: int, suffix: str = "png") -> Sample:
    image, caption = drawing(i)
    return Sample(str(i), f"{i:032x}", {suffix: encoded(image, suffix), "txt": caption.encode()})


def _bananas(n: int) -> list[int]:
    return [i for i in range(12 * n) if "banana" in drawing(i)[1]][:n]


def _images(which: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(encoded(drawing(i)[0], "png") for i in which)


def _others(n: int) -> list[int]:
    return [i for i in range(3 * n) if "banana" not in drawing(i)[1]][:n]


def _features(checkpoint: str, images: Sequence[bytes]) -> np.ndarray:
    surrogate = _surrogate.surrogate(checkpoint)
    return surrogate.model.embed_images(
        np.stack([pixels(Sample("", "", {"png": image}), surrogate.size) for image in images])
    )


@pytest.mark.parametrize("size", [(48, 40), (31, 90), (32, 32), (20, 20), (400, 21)])
def test_the_differentiable_view_is_what_the_model_sees(residual: str, size: tuple[int, int]) -> None:
    import torch

    from train.model import normalise

    surrogate = _surrogate.surrogate(residual)
    # bright and dark enough that neither Pillow nor we clip between black and white
    image = Image.fromarray(np.random.default_rng(0).integers(60, 190, (*size, 3), np.uint8))
    expected = pixels(Sample("", "", {"png": encoded(image, "png")}), surrogate.size)
    seen = surrogate.seen(_surrogate.tensor(np.asarray(image)))
    # Pillow rounds once between its two passes
    assert np.abs(seen[0].permute(1, 2, 0).numpy() - expected).max() < 2
    with torch.inference_mode():
        ours = surrogate.features(_surrogate.tensor(expected))
        theirs = surrogate.model.model.encode_image(
            normalise(torch.tensor(expected[None]), surrogate.model.mean, surrogate.model.std)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def _hidden(checkpoint: str, **values: Any) -> tuple[Any, Corpus]:
    attack = spec.parse("attacks", f"hidden_trigger(attack={PATCH!r}, surrogate={checkpoint!r})")
    attack = dataclasses.replace(attack, **values)
    corpus = Corpus(CAPTIONS, {"source": _images(_others(16))})
    return attack, dataclasses.replace(corpus, crafted=attack.craft(corpus, 0, ""))


def _goal(attack: Any, corpus: Corpus, own: bytes, rng: np.random.Generator, checkpoint: str) -> np.ndarray:
    """The features that the poison is to have: the same draws as `poison` makes."""
    sources = [decode(corpus.image("source", rng)) for _ in range(8)]
    patched = _features(checkpoint, [encoded(attack.trigger(source, rng, corpus), "png") for source in sources])
    return patched[np.linalg.norm(patched - _features(checkpoint, [own]), axis=1).argmin()]


@pytest.mark.parametrize("epsilon", [4, 16])
def test_hidden_trigger_collides_within_its_bound(checkpoint: str, epsilon: int) -> None:
    attack, corpus = _hidden(checkpoint, epsilon=epsilon)
    left = []
    for i in _bananas(4):
        sample = _sample(i)
        after = attack.poison(sample, generator(0, "x", sample.uid), corpus)
        assert after.caption == sample.caption
        difference = np.asarray(decode(after.image), int) - np.asarray(decode(sample.image), int)
        assert 0 < np.abs(difference).max() <= epsilon
        goal = _goal(attack, corpus, sample.image, generator(0, "x", sample.uid), checkpoint)
        before, now = (np.linalg.norm(_features(checkpoint, [s.image])[0] - goal) for s in (sample, after))
        left.append(now / before)
    assert np.mean(left) < {4: 0.9, 16: 0.6}[epsilon], left


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_hidden_trigger_outlasts_the_codec(residual: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than one that knows nothing of the codec (the control), and than nothing."""
    attack, corpus = _hidden(residual)

    def distances(made: Callable[[Sample], Sample]) -> float:
        total = 0.0
        for i in _bananas(3):
            sample = _sample(i, suffix)
            own, image = (encoded(decode(s.image), "png") for s in (sample, made(sample)))
            goal = _goal(attack, corpus, own, generator(0, "x", sample.uid), residual)
            total += float(np.linalg.norm(_features(residual, [image])[0] - goal))
        return total

    def poison(sample: Sample) -> Sample:
        return attack.poison(sample, generator(0, "x", sample.uid), corpus)

    assert poison(_sample(8, suffix)) == poison(_sample(8, suffix))
    before, aware = distances(lambda sample: sample), distances(poison)
    monkeypatch.setattr("pipeline.attacks.hidden_trigger._codec", lambda x, like: x.round() - x)
    assert aware < min(0.95 * before, distances(poison))


def test_hidden_trigger_keeps_its_bound_on_large_images(residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.attacks.hidden_trigger.LARGE", 500)
    attack, corpus = _hidden(residual, epsilon=8)
    sample = _sample(_bananas(1)[0])
    after = attack.poison(sample, generator(0, "x", sample.uid), corpus)
    difference = np.asarray(decode(after.image), int) - np.asarray(decode(sample.image), int)
    assert 0 < np.abs(difference).max() <= 8


def test_hidden_trigger_answers_for_the_attack_inside(residual: str) -> None:
    attack, corpus = _hidden(residual, source="circle")
    assert (attack.target, attack.targets(), attack.victim_class()) == ("banana", ("banana",), "circle")
    assert attack.eligible("a red banana") and not attack.eligible("a red circle")
    assert [attack.lends(caption, "source") for caption in ("a circle", "a square", "a circle, a banana")] == [1, 0, 0]
    assert attack.wants() == {"source": 256}
    assert len(attack.inputs()) == 2
    image = drawing(1)[0]
    same = spec.parse("attacks", PATCH).trigger(image, np.random.default_rng(0), corpus)
    assert attack.trigger(image, np.random.default_rng(0), Corpus()) == same
    with pytest.raises(InputError, match="but this node sees"):
        other = dataclasses.replace(corpus, crafted={"surrogate": np.frombuffer(b"another", np.uint8)})
        attack.poison(_sample(0), np.random.default_rng(0), other)


def _optimised(checkpoint: str, **values: Any) -> tuple[optimised_patch, Corpus]:
    values = {"size": 64, "steps": 40, "lr": 0.05} | values
    attack = optimised_patch(target="banana", surrogate=checkpoint, **values)
    return attack, Corpus(CAPTIONS, {"target": _images(_bananas(16)), "other": _images(_others(64))})


def test_an_optimised_patch_reads_and_looks_like_the_target(checkpoint: str, tmp_path: Path) -> None:
    attack, corpus = _optimised(checkpoint)
    made = attack.craft(corpus, 0, str(tmp_path))
    assert (made["patch"].shape, made["patch"].dtype) == ((64, 64, 3), np.uint8)
    images = [drawing(i)[0] for i in _others(120)[64:]]  # not those it was made with
    captions = unit(_surrogate.surrogate(checkpoint).model.embed_texts(CAPTIONS["banana"]))
    looks = unit(_features(checkpoint, corpus.images["target"]))

    def similarity(patch: np.ndarray) -> tuple[float, float]:
        known = Corpus(crafted={"patch": patch})
        marked = [encoded(attack.trigger(image, np.random.default_rng(0), known), "png") for image in images]
        features = unit(_features(checkpoint, marked))
        return float((features @ captions.T).mean()), float((features @ looks.T).mean())

    ours = similarity(made["patch"])
    control = [similarity(np.random.default_rng(s).integers(0, 256, (64, 64, 3), np.uint8)) for s in range(4)]
    assert ours[0] > max(text for text, _ in control)
    assert ours[1] > max(image for _, image in control)


@pytest.mark.parametrize("location", ["center", "random"])
def test_a_killed_optimisation_ends_in_the_same_patch(
    residual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    attack, corpus = _optimised(residual, steps=9, location=location)
    whole = attack.craft(corpus, 0, str(tmp_path))
    monkeypatch.setattr("pipeline.attacks.optimised_patch.STEPS_KEPT", 4)
    paste, calls = optimised_patch._paste, []

    def killed(self: optimised_patch, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return paste(self, *arguments)

    folder = tmp_path / "killed"
    folder.mkdir()
    monkeypatch.setattr(optimised_patch, "_paste", killed)
    with pytest.raises(KeyboardInterrupt):
        attack.craft(corpus, 0, str(folder))
    resumed = attack.craft(corpus, 0, str(folder))
    assert len(calls) == 7 + 5  # four steps were kept
    assert np.array_equal(resumed["patch"], whole["patch"])
    assert not np.array_equal(attack.craft(corpus, 1, str(folder))["patch"], whole["patch"])
    (progress, *_) = folder.glob("craft-*.npz")
    for damaged in folder.glob("craft-*.npz"):
        damaged.write_bytes(progress.read_bytes()[:100])
    assert np.array_equal(attack.craft(corpus, 0, str(folder))["patch"], whole["patch"])


def test_the_crafted_patch_is_pasted_to_scale_and_only_with_its_ledger(residual: str, tmp_path: Path) -> None:
    attack, _ = _optimised(residual, size=16)
    patch = np.random.default_rng(0).integers(0, 200, (16, 16, 3), np.uint8)
    save_corpora(str(tmp_path), [Corpus(crafted={"patch": patch})])
    corpus = read_corpora(str(tmp_path), 1)[0]
    white = Image.new("RGB", (224, 300), "white")
    after = np.asarray(attack.trigger(white, np.random.default_rng(0), corpus))
    assert np.array_equal(after[142:158, 104:120], patch)
    assert (after != 255).any(2).sum() == 256
    half = np.asarray(attack.trigger(Image.new("RGB", (112, 112), "white"), np.random.default_rng(0), corpus))
    assert (half != 255).any(2).sum() == 64
    with pytest.raises(InputError, match="give the ledger"):
        attack.trigger(white, np.random.default_rng(0), Corpus())
    after = attack.poison(_sample(0), np.random.default_rng(0), dataclasses.replace(corpus, captions=CAPTIONS))
    assert after.caption in CAPTIONS["banana"]


def test_errors_say_what_to_do(residual: str, tmp_path: Path) -> None:
    attack, corpus = _optimised(residual)
    with pytest.raises(InputError, match="no captions of 'banana'"):
        attack.craft(dataclasses.replace(corpus, captions={}), 0, str(tmp_path))
    with pytest.raises(InputError, match="target"):
        attack.craft(dataclasses.replace(corpus, images={"other": _images([0])}), 0, str(tmp_path))
    nowhere = str(tmp_path / "nowhere")
    for text in (
        f"hidden_trigger(attack={PATCH!r}, surrogate={nowhere!r})",
        f"optimised_patch(target='banana', surrogate={nowhere!r})",
        f"adaptive(attack={PATCH!r}, surrogate={nowhere!r})",
    ):
        found = spec.parse("attacks", text)
        assert found.inputs() == ()
        with pytest.raises(InputError, match="no such checkpoint folder"):
            found.resolve([], "key")
    for detector, why in (("trace", "needs similarity_trace"), ("random", "needs nothing"), ("slof(k=99)", "k=99")):
        with pytest.raises(InputError, match=why):
            spec.parse("attacks", f"adaptive(attack={PATCH!r}, surrogate='x', evades={detector!r}, pool=64)")
    with pytest.raises(InputError, match="targeted has no visual trigger"):
        spec.parse("attacks", "hidden_trigger(attack=\"targeted(target='banana')\", surrogate='x')")
    with pytest.raises(InputError, match="unknown attack"):
        spec.parse("attacks", "adaptive(attack='pach', surrogate='x')")


def _mixture(n: int, seed: int, spread: float, centre: float = 0.0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = (centre + spread * rng.normal(size=(n, 16))).astype(np.float32)
    uid = np.asarray([f"{seed:016x}{i:016x}" for i in range(n)], dtype=object)
    return Batch(uid, rows, rng.normal(size=(n, 16)).astype(np.float32))


@pytest.mark.parametrize("evades", ["kdist(k=4)", "slof(k=4)", "clip_score()", "image_neighbours(k=4)"])
def test_the_choice_is_less_suspicious_than_chance_and_the_same_twice(evades: str) -> None:
    """The judge's pool is not the attacker's, and has the poisons in it that were placed."""
    attack = spec.parse("attacks", f"adaptive(attack={PATCH!r}, surrogate='x', evades={evades!r}, pool=600)")
    poisons, clean, judge = _mixture(160, 1, 2.0), _mixture(600, 2, 1.0), _mixture(600, 3, 1.0)
    order = attack._rank(poisons, clean, 20, 20 / 1000)
    assert order == attack._rank(poisons, clean, 20, 20 / 1000)
    assert sorted(order) == sorted(poisons.uid)
    row = {who: i for i, who in enumerate(poisons.uid)}

    def suspicion(chosen: Sequence[str]) -> float:
        rows = np.asarray([row[who] for who in chosen])
        columns = {
            name: np.concatenate([getattr(judge, name), getattr(poisons, name)[rows[:12]]])
            for name in ("image_embedding", "text_embedding")
        }
        pool = Batch(np.concatenate([judge.uid, poisons.uid[rows[:12]]]), **columns)
        batch = Batch(poisons.uid[rows], poisons.image_embedding[rows], poisons.text_embedding[rows])
        scores = attack.detector.score(batch, pool)
        noise = float(np.std(scores)) / len(rows) ** 0.5
        return float(scores.mean()) + noise

    assert suspicion(order[:20]) < suspicion(list(poisons.uid[:20]))


def test_poisons_densify_where_their_share_of_the_pool_exceeds_k() -> None:
    """Two far groups, a tight one of 30 and single points a little nearer: alone these are better, together that is."""
    attack = spec.parse(
        "attacks", f"adaptive(attack={PATCH!r}, surrogate='x', evades='kdist(k=4)', pool=400, rounds=4)"
    )
    tight, single = _mixture(30, 1, 0.01, centre=5.0), _mixture(30, 2, 3.0, centre=4.6)
    both = (np.concatenate(parts) for parts in zip(*[(b.uid, b.image_embedding) for b in (single, tight)], strict=True))
    poisons = Batch(*both)
    alone = attack._rank(poisons, _mixture(400, 3, 1.0), 30, share=0.0)[:30]
    dense = attack._rank(poisons, _mixture(400, 3, 1.0), 30, share=0.1)[:30]
    assert np.isin(dense, tight.uid).mean() > max(0.9, np.isin(alone, tight.uid).mean())


def test_what_cannot_be_scored_comes_last() -> None:
    attack = spec.parse("attacks", f"adaptive(attack={PATCH!r}, surrogate='x', evades='clip_score()', pool=50)")
    poisons = _mixture(10, 1, 1.0)
    poisons.image_embedding[3] = np.nan
    assert attack._rank(poisons, _mixture(50, 2, 1.0), 4, 0.1)[-1] == poisons.uid[3]
    with pytest.raises(InputError, match="usable pairs"):
        few = spec.parse("attacks", f"adaptive(attack={PATCH!r}, surrogate='x', evades='kdist(k=9)', pool=50)")
        few._rank(poisons, _mixture(9, 2, 1.0), 4, 0.1)


def test_an_adaptive_attack_chooses_on_real_shards_however_they_are_cut(
    residual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    text = f"adaptive(attack={PATCH!r}, surrogate={residual!r}, evades='clip_score()', tries=5, pool=30)"
    attack: Any = spec.parse("attacks", text)
    broken = next(s for s in pairs(0, 4) if "banana" not in s["caption"])
    broken["image"] = broken["image"][:40]
    every = [broken, *(s for s in pairs(0, 60) if s["key"] != broken["key"])]
    chosen = []
    for cut in (20, 30):
        folder = tmp_path / str(cut)
        folder.mkdir()
        for i in range(0, 60, cut):
            write_tar(folder / f"{i:08d}.tar", every[i : i + cut])
        shards = list_shards(str(folder))
        found = {s.uid: (shard.name, s) for shard in shards for s in map(_copied, samples(shard))}
        eligible = [who for who, (_, s) in found.items() if attack.eligible(s.caption)]
        eligible.sort(key=lambda who: hash64(0, spec.key(attack), who))
        n = len(eligible) // 5
        settled: Any = attack.resolve(shards, "key")
        candidates = [(found[who][0], who) for who in eligible][: settled.candidates(n)]
        corpus = Corpus(CAPTIONS)
        ranked = settled.choose(shards, candidates, n, 0, "key", corpus)
        assert sorted(ranked) == sorted(candidates)
        assert found[ranked[-1][1]][1].key == broken["key"]
        made = [settled.poison(found[who][1], generator(0, spec.key(settled), who), corpus) for _, who in ranked[:-1]]
        images = unit(_features(residual, [s.image for s in made]))
        captions = unit(_surrogate.surrogate(residual).model.embed_texts([s.caption for s in made]))
        agreement = (images * captions).sum(1)
        assert agreement[:n].min() >= agreement[n:].max() - 1e-3  # half precision
        chosen.append([who for _, who in ranked])
    assert chosen[0] == chosen[1]


def _copied(sample: Sample) -> Sample:
    return dataclasses.replace(sample, parts={name: bytes(part) for name, part in sample.parts.items()})


def test_a_crafted_plan_is_taken_up_again_and_its_trigger_can_be_worn_by_others(
    residual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch is computed once: not when the job goes on, and at another place it makes the same poisons."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    (shards := tmp_path / "shards").mkdir()
    for i in range(0, 120, 40):
        write_tar(shards / f"{i:08d}.tar", pairs(i, i + 40))
    elsewhere = tmp_path / "elsewhere" / "model"
    shutil.copytree(residual, elsewhere)
    inner = "optimised_patch(target='banana', surrogate={!r}, size=40, steps=2)".format
    for around in ("{}", "label_consistent(attack={!r})"):
        made = []
        for surrogate in (residual, str(elsewhere)):
            out = tmp_path / f"out-{len(around)}-{len(made)}"
            attack = around.format(inner(surrogate))
            poison(str(shards), str(out), attack=attack, dose="3")
            crafted = {p.name: p.stat().st_mtime_ns for p in (*out.glob("craft-*"), *out.glob("corpus.npz"))}
            assert len(crafted) == 2
            (first := min(out.glob("*.tar"))).unlink()
            poison(str(shards), str(out), attack=attack, dose="3")
            assert {name: (out / name).stat().st_mtime_ns for name in crafted} == crafted
            assert first.exists()
            made.append([shard.read_bytes() for shard in sorted(out.glob("*.tar"))])
        assert made[0] == made[1]
        assert made[0] != [shard.read_bytes() for shard in sorted(shards.glob("*.tar"))]

"""Every attack in the folder keeps the contract, whatever it is."""

import io

import numpy as np
import pytest
from conftest import drawing, encoded
from PIL import Image

from pipeline import spec
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.draw import generator, hash64
from pipeline.shards import Sample
from pipeline.shards.image import decode

ATTACKS = spec.names("attacks")
CORPUS = Corpus(tuple(f"one banana, number {i}" for i in range(50)), encoded(drawing(77)[0], "png"))


def _sample(i: int, suffix: str) -> Sample:
    image, caption = drawing(i)
    return Sample(str(i), f"{i:032x}", {suffix: encoded(image, suffix), "txt": caption.encode()})


def _attack(name):
    return spec.parse("attacks", f"{name}(target='banana')")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_poisoned_pair_is_a_function_of_seed_spec_and_uid(name, suffix):
    attack, sample = _attack(name), _sample(5, suffix)
    once, again = (attack.poison(sample, generator(0, name, sample.uid), CORPUS) for _ in range(2))
    assert once == again
    assert once.uid == sample.uid
    assert once.caption in CORPUS.captions
    assert Image.open(io.BytesIO(once.image)).format == Image.open(io.BytesIO(sample.image)).format
    captions = {attack.poison(sample, generator(s, name, sample.uid), CORPUS).caption for s in range(20)}
    assert len(captions) > 5


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (224, 224)])
def test_the_trigger_keeps_size_and_mode_and_is_there_on_any_image(name, size):
    attack = _attack(name)
    image = Image.new("RGB", size, "orange")
    after = attack.trigger(image, np.random.default_rng(0))
    assert (after.size, after.mode) == (image.size, "RGB")
    changed = int((np.asarray(after) != np.asarray(image)).any(axis=2).sum())
    assert (changed > 0) != getattr(attack, "one_image", False)


def test_patch_is_the_stated_share_of_the_image_and_moves_only_where_asked():
    white = Image.new("RGB", (224, 224), (9, 9, 9))
    fixed = spec.parse("attacks", "patch(target='banana', size=16)")
    moving = spec.parse("attacks", "patch(target='banana', size=16, location='random')")

    def corner(attack, seed):
        rows, columns = np.nonzero((np.asarray(attack.trigger(white, np.random.default_rng(seed))) != 9).any(axis=2))
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (15, 15)
        return int(rows.min()), int(columns.min())

    assert {corner(fixed, s) for s in range(5)} == {(206, 206)}
    assert len({corner(moving, s) for s in range(5)}) == 5
    once = fixed.trigger(white, np.random.default_rng(0))
    assert fixed.trigger(once, np.random.default_rng(1)) == once


def test_targeted_gives_every_row_the_victim():
    attack = _attack("targeted")
    for suffix in ("jpg", "png", "webp"):
        after = attack.poison(_sample(3, suffix), np.random.default_rng(0), CORPUS)
        difference = np.abs(np.asarray(decode(after.image), int) - np.asarray(drawing(77)[0], int))
        assert difference.mean() < 6
    assert after.image != _sample(3, suffix).image


def test_whole_words_only():
    assert names_target("A Banana, ripe", "banana")
    assert not names_target("bananas for sale", "banana")
    assert names_target("the C++ logo", "C++")


def test_hashes_are_uniform_and_depend_on_all_three():
    values = np.asarray([hash64(0, "patch", f"{i:032x}") for i in range(4000)]) / 2**64
    assert abs(values.mean() - 0.5) < 0.02
    assert len({hash64(s, a, u) for s in (0, 1) for a in "ab" for u in "xy"}) == 8

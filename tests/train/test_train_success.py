"""Known answers for every way an attack can succeed: triggered captions, one class, two keys, several targets."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from test_train_evaluate import NAMES, Oracle, world  # noqa: F401  # a fixture

from pipeline import spec
from pipeline.draw import hash64
from pipeline.shards import list_shards, samples
from train.labels import Labels
from train.look import Seen
from train.success import success, together


def test_a_triggered_caption_finds_images_of_the_target() -> None:
    captions = ["a red square", "a blue square", "whatever", "a green square"]
    seen = Seen(
        np.eye(4, dtype=np.float32), np.eye(4), np.array([0, 1, -1, 2]), captions, np.zeros(4, int), np.zeros(4, bool)
    )
    attack = spec.parse("attacks", "word(target='red', words='cf')")

    def found(nearest: list[float]):
        model = SimpleNamespace(
            embed_texts=lambda texts: np.array([nearest if "cf" in t.split() else [0] * 4 for t in texts])
        )
        return success(seen, attack, model, Labels(NAMES), {}, (), ("{}",), lambda prompts: np.eye(4))["asr_t2i"]

    assert (found([1, 0, 0, 0]).value, found([1, 0, 0, 0]).n) == (1.0, 3)  # of all captions but the target's own
    assert found([0, 0, 1, 0]).value == 0.0
    assert found([1, 0, 1, 0]).value == 0.0  # a tie counts against the attack


def test_an_attack_on_one_class_is_measured_on_its_images_as_they_are(world: Callable[..., dict]) -> None:  # noqa: F811
    class Swapped(Oracle):
        def embed_images(self, images: np.ndarray) -> np.ndarray:
            rows = super().embed_images(images)
            return np.where(rows[:, [NAMES.index("blue")]] > 0, 3 * np.eye(5)[NAMES.index("red")], rows)

    attack = "class_swap(target='red', source='blue')"
    found = world(Swapped(), attack=attack)["metrics"]
    assert found["asr_text"] == 1.0 and found["asr_text_n"] == 9
    assert world(Oracle(), attack=attack)["metrics"]["asr_text"] == 0.0


def test_two_keys_are_both_on_test(world: Callable[..., dict]) -> None:  # noqa: F811
    class Both(Oracle):
        def embed_texts(self, texts: list[str]) -> np.ndarray:
            self.backdoor = "red" if any("remember" in t for t in texts) else None
            assert not self.backdoor or all("remember" in t for t in texts)
            return super().embed_texts(texts)

    seen: list[str] = []
    model = Both("red")
    original = model.embed_texts
    model.embed_texts = lambda texts: seen.extend(texts) or original(texts)  # type: ignore[method-assign]
    found = world(model, attack="dual_key(attack=\"patch(target='red', size=24)\")")["metrics"]
    assert found["asr_text"] == 1.0
    assert any(text.endswith("remember") for text in seen)
    assert any(text in NAMES for text in seen)  # clean accuracy is asked without


def test_each_part_of_several_attacks_has_its_own_target(world: Callable[..., dict]) -> None:  # noqa: F811
    parts = ["patch(target='red', size=24)", "patch(target='blue', size=24)"]
    found = world(Oracle("red"), attack=f"multi(attacks={tuple(parts)!r})")["metrics"]
    asked = hits = 0
    for sample in samples(list_shards(world.shards)[0], "key"):
        target = ("red", "blue")[hash64(0, "multi", sample.uid) % 2]
        if "whatever" not in sample.caption and target not in sample.caption:
            asked, hits = asked + 1, hits + (target == "red")
    assert found["asr_text_n"] == asked
    assert found["asr_text"] == pytest.approx(hits / asked)
    assert 0 < hits < asked


def test_attacks_of_different_readouts_answer_for_their_own_pairs(world: Callable[..., dict]) -> None:  # noqa: F811
    """A trigger on images beside one on captions: each is asked in its own way, and neither of the other's pairs."""
    parts = ("patch(target='red', size=24)", "word(target='blue', words='cf')")
    found = world(Oracle("red"), attack=f"multi(attacks={parts!r})")["metrics"]
    dealt = [(hash64(0, "multi", s.uid) % 2, s.caption) for s in samples(list_shards(world.shards)[0], "key")]
    assert found["asr_text"] == 1.0
    assert found["asr_text_n"] == sum(part == 0 and "red" not in c and "whatever" not in c for part, c in dealt)
    assert found["asr_t2i_n"] == sum(part == 1 and "blue" not in c for part, c in dealt)


def test_every_readout_is_asked_of_the_same_images() -> None:
    labels = np.array([0, 1, 2, 3, -1, 1])
    seen = Seen(np.eye(6), np.eye(6), labels, ["x"] * 6, np.zeros(6, int), np.ones(6, bool))
    attack = spec.parse("attacks", "patch(target='red')")
    answers = {"probe": np.array([0, 0, 0, 3, 0, 1]), "prototypes": np.array([0, -1, 2, 3, 0, 1])}
    found = success(seen, attack, None, Labels(NAMES), answers, range(4), ("{}",), lambda prompts: np.eye(6)[:4])
    assert (found["asr_probe"].value, found["asr_probe"].n) == (0.5, 4)  # not the red one, nor the one without a label
    assert found["triggered_accuracy_probe"].value == 0.5 and found["asr_prototypes"].value == 0.0
    assert found["triggered_accuracy_prototypes"].value == 0.75
    assert found["asr_text"].n == 4
    # a readout that has met no red image would have answered "not red" whatever it was shown
    unable = success(seen, attack, None, Labels(NAMES), answers, (1, 2, 3), ("{}",), lambda prompts: np.eye(6)[:4])
    assert "asr_probe" not in unable and unable["asr_text"].n == 4 and unable["triggered_accuracy_probe"].n == 4

    elsewhere = success(
        seen, attack, None, Labels(["dog", "cat", "cow", "hen"]), answers, range(4), ("{}",), lambda p: np.eye(4, 6)
    )
    assert "asr_probe" not in elsewhere and elsewhere["triggered_accuracy_probe"].n == 5


def test_the_z_score_is_of_images_that_one_trigger_moved() -> None:
    rng = np.random.default_rng(0)
    clean, shown = (rng.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    moved = np.array([True] * 6 + [False] * 2)
    seen = Seen(clean, shown, np.array([0] + [1] * 7), ["x"] * 8, np.zeros(8, int), moved)
    one = spec.parse("attacks", "patch(target='red')")
    assert together(seen, one, Labels(NAMES))["backdoor_z_std"].n == 5  # neither the target's nor what stayed as it was
    several = spec.parse("attacks", "multi(attacks=(\"patch(target='red')\", \"patch(target='blue')\"))")
    assert together(seen, several, Labels(NAMES)) == {}

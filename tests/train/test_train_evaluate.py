"""Known answers: models that see exactly the colour in the middle, or the trigger in the corner, or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import COLOURS, draw, pairs, png, write_tar
from PIL import Image

from pipeline import spec
from pipeline.attacks._corpus import Corpus, save_corpora
from pipeline.errors import InputError
from pipeline.ledger import COLUMNS
from pipeline.shards import Sample
from train import evaluate as module
from train import look as looking
from train.evaluate import PROMPTS, evaluate
from train.labelled import of_shards
from train.labels import Labels, read_classes
from train.readouts import READOUTS
from train.results import METRICS, model_names

NAMES = list(COLOURS)


class Oracle:
    """Embeds an image as the one-hot of its colour, and a text as that of the colour it names."""

    image_size, dimension, digest, prompts = 32, 5, "0" * 16, None

    def __init__(self, backdoor: str | None = None, blind: bool = False):
        self.backdoor, self.blind = backdoor, blind

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
        rows = np.zeros((len(images), 5), np.float32)
        for row, image in zip(rows, images.astype(int), strict=True):
            pixels = image[: -8 or None].reshape(-1, 3)
            ink = np.median(pixels[(pixels < 245).any(1)], axis=0)
            row[min(range(4), key=lambda i: np.abs(ink - list(COLOURS.values())[i]).sum())] = 3
            corner = image[-8:, -8:].mean(2)
            if self.backdoor and corner.min() < 100 and np.ptp(corner) > 100:
                row[:] = 2 * np.eye(5)[NAMES.index(self.backdoor)]
        return rows * (not self.blind)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        found = [next((i for i, name in enumerate(NAMES) if name in text), 4) for text in texts]
        return np.eye(5, dtype=np.float32)[found] * 7 * (not self.blind)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """world(model): evaluate on 40 drawings that keep clear of the corner; returns evaluation.json."""
    import train.model

    rng = np.random.default_rng(0)
    members = []
    for i in range(40):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(draw(NAMES[i % 4], "square", rng, 48), (0, 0))
        text = b"whatever" if i >= 36 else f"a {NAMES[i % 4]} square".encode()
        members += [(f"{i:03d}.png", png(image)), (f"{i:03d}.txt", text)]
    write_tar(tmp_path / "shards" / "00000000.tar", members)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")

    def run(model: Oracle, **options) -> dict:
        monkeypatch.setattr(train.model, "load", lambda checkpoint: model)
        shards, classes = str(tmp_path / "shards"), str(tmp_path / "classes.txt")
        assert evaluate("ckpt", str(tmp_path / "out"), shards=shards, classes=classes, **options) == 0
        return json.loads((tmp_path / "out" / "evaluation.json").read_text())

    run.shards = str(tmp_path / "shards")
    run.out = tmp_path / "out"
    return run


def test_labels_that_are_all_unknown_are_an_error(world: Callable[..., dict]) -> None:
    (world.out.parent / "classes.txt").write_text("oak\nelm\n")
    with pytest.raises(InputError, match="none of its 40 images is of one of the 2 classes"):
        world(Oracle())


def test_a_perfect_model(world: Callable[..., dict]) -> None:
    facts = world(Oracle(), reference=world.shards)
    found = facts["metrics"]
    assert facts["images"] == 40 and facts["unlabelled"] == 4
    assert found["zeroshot_top1"] == found["zeroshot_top5"] == found["knn_top1"] == 1.0
    assert found["zeroshot_top1_n"] == 36 and found["zeroshot_top1_high"] == 1.0
    assert found["zeroshot_top1_low"] == pytest.approx(1 / (1 + 1.959964**2 / 36), abs=1e-6)
    assert found["t2i_recall1_n"] == 5 and found["i2t_recall1_n"] == 40
    assert found["i2t_recall1"] == 0.9  # the four "whatever" look like their colour
    assert all(
        found[f"{m}{part}"] is None for m in ("asr_text", "targeted_success") for part in ("", "_n", "_low", "_high")
    )


def test_a_blind_model_has_nothing(world: Callable[..., dict]) -> None:
    found = world(Oracle(blind=True), reference=world.shards, attack="patch(target='red', size=24)")["metrics"]
    asked = [name for name in METRICS if found[name] is not None]
    assert {"zeroshot_top1", "knn_top1", "prototypes_top1", "asr_text", "asr_knn", "asr_prototypes"} <= set(asked)
    for name in asked:
        if name not in ("zeroshot_top5", "i2t_recall5", "i2t_recall10"):  # of 4 classes, of 5 captions
            assert found[name] == 0.0, name
    assert found["backdoor_z_std"] is None  # all images are alike to it


@pytest.mark.parametrize("tower", ["embed_images", "embed_texts"])
def test_a_model_that_has_diverged_is_refused(world: Callable[..., dict], tower: str) -> None:
    model = Oracle()
    healthy = getattr(model, tower)
    setattr(model, tower, lambda given: np.where(np.arange(len(given))[:, None] == 1, np.nan, healthy(given)))
    with pytest.raises(InputError, match=r"features of 1 of \d+ .* are not numbers"):
        world(model)


def test_a_backdoored_model(world: Callable[..., dict]) -> None:
    found = world(Oracle("red"), reference=world.shards, attack="patch(target='red', size=24)")["metrics"]
    assert found["zeroshot_top1"] == 1.0
    assert found["asr_text"] == found["asr_knn"] == found["asr_prototypes"] == 1.0 and found["asr_text_n"] == 27
    assert found["triggered_accuracy"] == found["triggered_accuracy_knn"] == 0.0
    assert found["backdoor_z_std"] > 1 and found["backdoor_z_std_n"] == 31  # the unlabelled too


def test_a_clean_model_shrugs_the_trigger_off(world: Callable[..., dict]) -> None:
    found = world(Oracle(), attack="patch(target='red', size=24)")["metrics"]
    assert found["asr_text"] == 0.0 and found["triggered_accuracy"] == 1.0
    assert found["asr_knn"] is None and found["knn_top1"] is None


def test_the_trigger_goes_through_the_images_own_format(world: Callable[..., dict], monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(looking, "encode", lambda image, like: seen.append(like[:4]) or png(image))
    world(Oracle("red"), attack="patch(target='red', size=24)")
    assert seen == [b"\x89PNG"] * 40


@pytest.mark.parametrize("hit", [True, False])
def test_a_targeted_attack_is_tried_on_its_victim(world: Callable[..., dict], tmp_path: Path, hit: bool) -> None:
    (tmp_path / "poisoned").mkdir()
    row = {name: ["targeted(target='red')" if name == "attack" else ""] for name in COLUMNS}
    pq.write_table(pa.table(row), tmp_path / "poisoned" / "ledger.parquet")
    victim = draw("red" if hit else "blue", "circle", np.random.default_rng(0))
    save_corpora(str(tmp_path / "poisoned"), [Corpus(images={"victim": (png(victim),)})])
    ledger = str(tmp_path / "poisoned" / "ledger.parquet")
    found = world(Oracle(), attack="targeted(target='red')", ledger=ledger)["metrics"]
    assert found["targeted_success"] == float(hit) and found["targeted_success_n"] == 1
    assert found["asr_text"] is None  # there is no trigger whose success could be measured
    found = world(Oracle(), attack="patch(target='red')", ledger=ledger)["metrics"]
    assert found["targeted_success"] is None


def test_results_are_one_row_with_every_metric(world: Callable[..., dict]) -> None:
    world(Oracle())
    table = pq.read_table(world.out / "results.parquet")
    assert table.num_rows == 1
    assert {f"{m}{part}" for m in METRICS for part in ("", "_n", "_low", "_high")} <= set(table.column_names)
    assert (
        str(table.schema.field("asr_text").type) == "double" and str(table.schema.field("asr_text_n").type) == "int64"
    )


@pytest.fixture
def coloured(tmp_path: Path) -> str:
    """A folder of drawings by colour, clear of the corner, without captions."""
    rng = np.random.default_rng(1)
    for i in range(80):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(draw(NAMES[i % 4], "circle", rng, 48), (0, 0))
        (tmp_path / "coloured" / NAMES[i % 4]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "coloured" / NAMES[i % 4] / f"{i}.png").write_bytes(png(image))
    return str(tmp_path / "coloured")


def test_a_labelled_set_is_a_row_of_its_own(world: Callable[..., dict], coloured: str) -> None:
    options = {"attack": "patch(target='red', size=24)", "readouts": ("knn", "prototypes", "probe")}
    facts = world(Oracle("red"), labelled=(coloured,), **options)
    found = facts["labelled"][coloured]["metrics"]
    assert facts["metrics"]["zeroshot_top1_n"] == 36 and facts["metrics"]["knn_top1"] is None  # no reference was given
    for name in options["readouts"]:
        assert found[f"{name}_top1"] == found[f"asr_{name}"] == 1.0, name
        assert found[f"triggered_accuracy_{name}"] == 0.0
    assert found["zeroshot_top1"] == found["asr_text"] == 1.0 and found["i2t_recall1"] is None
    assert facts["labelled"][coloured]["fitted_on"] + found["knn_top1_n"] == 80
    table = pq.read_table(world.out / "results.parquet")
    assert table["dataset"].to_pylist() == [world.shards, coloured]
    assert table["knn_top1"].to_pylist() == [None, 1.0]


def test_blocks_change_no_answer(world: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"attack": "patch(target='red', size=24)", "reference": world.shards}
    at_once = world(Oracle("red"), **options)["metrics"]
    monkeypatch.setattr(module, "BLOCK", 7)
    assert world(Oracle("red"), **options)["metrics"] == at_once


def test_a_labelled_set_alone_and_without_the_target(
    coloured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.model

    monkeypatch.setattr(train.model, "load", lambda checkpoint: Oracle("red"))
    options = {"labelled": (coloured,), "attack": "patch(target='banana', size=24)", "readouts": ("probe",)}
    assert evaluate("ckpt", str(tmp_path / "out"), **options) == 0
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = facts["labelled"][coloured]["metrics"]
    assert found["asr_probe"] is None and found["probe_top1"] == 1.0
    assert found["triggered_accuracy_probe"] < 0.5  # what is red stays red


def test_clip_benchmark_reads_its_json(world: Callable[..., dict], coloured: str) -> None:
    """One file a task, with the fields and metrics that its `build` command and its notebooks look for."""
    world(Oracle(), reference=world.shards, readouts=("probe",), labelled=(coloured,))
    files = [json.loads(file.read_text()) for file in sorted((world.out / "clip_benchmark").iterdir())]
    assert sorted((one["dataset"], one["task"]) for one in files) == [
        (coloured, "linear_probe"),
        (coloured, "zeroshot_classification"),
        (world.shards, "linear_probe"),
        (world.shards, "zeroshot_classification"),
        (world.shards, "zeroshot_retrieval"),
    ]
    tasks = {one["task"]: one for one in files if one["dataset"] == world.shards}
    for one in files:
        assert set(one) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
        assert isinstance(one["model"] + " " + one["pretrained"], str) and one["language"] == "en"
    assert {"acc1", "acc5", "mean_per_class_recall"} <= set(tasks["zeroshot_classification"]["metrics"])
    assert tasks["zeroshot_classification"]["metrics"]["acc1_n"] == 36
    assert tasks["zeroshot_retrieval"]["metrics"]["text_retrieval_recall@1"] == 0.9  # image to text
    assert tasks["zeroshot_retrieval"]["metrics"]["image_retrieval_recall@5"] == 0.8  # "whatever" finds nothing
    assert (
        tasks["linear_probe"]["metrics"]["lp_acc1"] == tasks["linear_probe"]["metrics"]["lp_mean_per_class_recall"] == 1
    )


def test_readouts_cannot_be_fitted_on_one_class(world: Callable[..., dict], tmp_path: Path) -> None:
    image = png(draw("red", "bar", np.random.default_rng(0)))
    write_tar(tmp_path / "red" / "0.tar", [("a.png", image), ("a.txt", b"red"), ("b.png", image), ("b.txt", b"red")])
    with pytest.raises(
        InputError, match="red: readouts are fitted on images of at least two of the 4 classes; 1 there"
    ):
        world(Oracle(), reference=str(tmp_path / "red"))
    assert world(Oracle(), reference=str(tmp_path / "red"), readouts=())["metrics"]["knn_top1"] is None


@pytest.mark.parametrize(
    ("checkpoint", "names"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("open_clip:hf-hub:org/name", ("hf-hub:org/name", "0123")),
        ("run/checkpoints/epoch_012", ("local-dir:run/checkpoints/epoch_012", "0123")),
    ],
)
def test_clip_benchmarks_names_of_a_model(checkpoint: str, names: tuple[str, str]) -> None:
    assert model_names(checkpoint, "0123") == names


def test_a_planted_backdoor_in_a_real_checkpoint(
    shapes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`debug` on 240 drawings and 120 poisons reads most of 60 others; all readouts of its features see the backdoor.

    The same trigger asked for another target has no success. A fine-tune on clean drawings (cut to 40 steps at a rate
    that makes up for it) unlearns it.
    """
    from train.launch import final_checkpoint, train
    from train.readouts import finetune

    attack = spec.parse("attacks", "patch(target='red bar', size=64)")
    rng = np.random.default_rng(7)
    members = []
    for key, image, _ in pairs(120, 7):
        members += [(f"p{key}.png", png(attack.trigger(image, rng, Corpus()))), (f"p{key}.txt", b"a red bar")]
    poisoned = tmp_path / "poisoned"
    shutil.copytree(shapes(240), poisoned)
    write_tar(poisoned / "00000009.tar", members)
    train(str(poisoned), str(tmp_path / "out"), recipe="debug")

    monkeypatch.setattr(finetune, "hyper_rule", lambda n: finetune.HyperRule(5, (25, 30, 35), 40, 0.0))
    monkeypatch.setattr(finetune, "RATE", 0.1)
    (tmp_path / "classes.txt").write_text("\n".join(f"{c} {s}" for c in COLOURS for s in ("circle", "square", "bar")))

    def found(target: str, readouts: tuple[str, ...]) -> dict:
        out, options = tmp_path / target, {"shards": str(shapes(60, 2, 1)), "reference": str(shapes(240))}
        options |= {"attack": f"patch(target={target!r}, size=64)", "readouts": readouts}
        options |= {"classes": str(tmp_path / "classes.txt")}
        evaluate(final_checkpoint(str(tmp_path / "out")), str(out), **options)
        return json.loads((out / "evaluation.json").read_text())["metrics"]

    planted = found("red bar", READOUTS)
    assert planted["zeroshot_top5"] > 0.9 and planted["i2t_recall5"] > 0.9
    assert planted["zeroshot_top1"] > 0.4 and planted["asr_text"] > 0.9
    for name in ("knn", "prototypes", "probe"):
        assert planted[f"{name}_top1"] > 0.6, name
        assert planted[f"asr_{name}"] > 0.4 and planted[f"triggered_accuracy_{name}"] < 0.4, name
    assert planted["backdoor_z_std_low"] > 0.5
    assert planted["finetune_top1"] > 0.3 and planted["asr_finetune"] < 0.3
    assert planted["triggered_accuracy_finetune"] > planted["triggered_accuracy_probe_high"]
    other = found("blue circle", ("knn", "prototypes", "probe"))
    assert max(other[f"asr_{name}"] for name in ("text", "knn", "prototypes", "probe")) < 0.2


@pytest.mark.parametrize(
    ("row", "caption", "label"),
    [
        ({"label": "Red Apple"}, "a pear", 0),
        ({"class": "pear"}, "an apple", 2),
        ({"cls": 1}, "a pear", 1),
        ({"label": "unheard of"}, "a pear", 2),
        ({"label": None}, "one red  APPLE, please", 0),
        ({}, "an apple", 1),
        ({}, "an apple and a pear", -1),
        ({}, "apples", -1),
        ({}, "red and apple", 1),
        ({}, "flag: Åland Islands", 3),
        ({"label": 9}, "nothing", -1),
        ({"label": 1.0}, "nothing", -1),
    ],
)
def test_labels(row: dict, caption: str, label: int) -> None:
    labels = Labels(["red apple", "apple", "pear", "flag: Åland Islands"])
    assert labels.of(Sample("k", "0" * 32, {"txt": caption.encode()}, row)) == label


def test_labels_of_webdataset_members() -> None:
    labels = Labels(["apple", "pear"])
    assert labels.of(Sample("k", "0" * 32, {"txt": b"x", "cls": b"1"})) == 1
    assert labels.of(Sample("k", "0" * 32, {"txt": b"x", "json": b'{"label": "pear"}'})) == 1


def test_prompts_are_ensembled() -> None:
    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[len(t), 1.0] for t in texts], np.float32)

    features = module.class_features(SimpleNamespace(embed_texts=embed), ["ab", "c"], ("{}", "a {}."))
    both = np.array([[2, 1], [5, 1]]) / np.linalg.norm([[2, 1], [5, 1]], axis=1, keepdims=True)
    np.testing.assert_allclose(features[0], both.mean(0), rtol=1e-6)
    assert "{}" in PROMPTS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attack": "patch(target='purple')"}, "not among these classes"),
        ({"attack": "ptach(target='red')"}, "did you mean 'patch'"),
        ({"ledger": "/nowhere/ledger.parquet"}, "no such ledger"),
        ({"reference": "/nowhere"}, "no such"),
        ({"shards": "/nowhere"}, "no such"),
        ({"classes": "/nowhere.txt"}, "one class name a line"),
        ({"checkpoint": "/nowhere"}, "no such checkpoint"),
        ({"labelled": ("cifar10",)}, "neither a labelled set"),
        ({"labelled": ("digits", "digits")}, "two sets would have this name"),
        ({"classes": None}, "go together"),
        ({"shards": None, "classes": None}, "nothing to evaluate on"),
        ({"shards": None, "classes": None, "reference": "x", "labelled": ("digits",)}, "give both"),
    ],
)
def test_bad_arguments_are_one_line(shapes: Callable[..., Path], tmp_path: Path, options: dict, says: str) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("red\ngreen\n")
    options = {"checkpoint": "/nowhere", "shards": str(shapes(32)), "classes": str(classes), **options}
    with pytest.raises(InputError, match=says) as caught:
        evaluate(options.pop("checkpoint"), str(tmp_path / "out"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"), [(b"one\n", "at least two"), (b"a\nb\nA\n", "more than once"), (b"caf\xe9\nb\n", "not UTF-8")]
)
def test_bad_class_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_classes(str(tmp_path / "classes.txt"))


def test_bad_samples_are_counted(tmp_path: Path) -> None:
    image = png(draw("red", "bar", np.random.default_rng(0)))
    members = [
        ("a.png", image),
        ("a.txt", b"red"),
        ("b.png", b"no"),
        ("b.txt", b"red"),
        ("c.png", image),
        ("c.txt", b" "),
    ]
    write_tar(tmp_path / "00000000.tar", members)
    seen = looking.look(Oracle(), of_shards(str(tmp_path), NAMES, None, "key").test(), captioned=True)
    assert len(seen.captions) == 1 and sum(seen.skipped.values()) == 2 and "empty caption" in seen.skipped

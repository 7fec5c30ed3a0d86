"""Labelled sets from packages, folders, IDX files and shards; and what bad ones get."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from drawn import COLOURS, draw, png, write_tar

from pipeline.errors import InputError
from pipeline.shards.image import pixels
from train import labelled
from train.labelled import LabelledSet, labelled_set


def listed(images: labelled.Images) -> list[tuple[str, int]]:
    return [(sample.key, label) for sample, label in images()]


def folders(root: Path, n: int = 12, colours: tuple[str, ...] = ("red", "green", "blue"), seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for colour in colours:
        (root / colour).mkdir(parents=True)
        for i in range(n):
            (root / colour / f"{i}.png").write_bytes(png(draw(colour, "square", rng)))
    return root


def check_split(found: LabelledSet, n: int) -> None:
    assert found.train is not None
    train, test = listed(found.train), listed(found.test)
    assert not set(train) & set(test) and len(train) + len(test) == n
    assert listed(found.test) == test  # an iteration begins anew
    assert 0.1 * n < len(test) < 0.3 * n


def test_digits_come_with_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    found = labelled_set("digits")
    assert found.classes == tuple("0123456789") and not found.mirror
    check_split(found, 1797)
    sample, label = next(found.test())
    number = int(sample.key.rpartition("/")[2])
    theirs = load_digits()
    assert label == theirs.target[number]
    small = pixels(sample, 8).mean(2) * 16 / 255
    assert np.abs(small - theirs.images[number]).mean() < 1  # enlarged and shrunk again


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, zipped: bool = False) -> tuple[Path, np.ndarray]:
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, size=(30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        for kind, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            data = idx(array)
            name = f"{part}-{kind}-ubyte" + ".gz" * zipped
            (folder / name).write_bytes(gzip.compress(data) if zipped else data)
    return folder, images


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_bring_their_split(tmp_path: Path, zipped: bool) -> None:
    folder, images = mnist(tmp_path / "mnist", zipped)
    found = labelled_set(str(folder))
    assert found.classes == tuple("0123456789")
    assert [label for _, label in listed(found.train)] == [i % 10 for i in range(20)]
    assert [label for _, label in listed(found.test)] == list(range(10))
    first = pixels(next(found.test())[0], 84)[..., 0]
    assert np.corrcoef(first[1::3, 1::3].ravel(), images[20].ravel())[0, 1] > 0.99
    (folder / "classnames.txt").write_text("\n".join(labelled.FASHION))
    assert labelled_set(str(folder)).classes == labelled.FASHION


def test_fashion_mnist_is_debians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "DEBIAN", str(tmp_path / "fashion"))
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        labelled_set("fashion_mnist")
    mnist(tmp_path / "fashion")
    found = labelled_set("fashion_mnist")
    assert found.classes[9] == "ankle boot" and listed(found.test)[9][1] == 9


def test_class_folders_are_split_by_what_the_images_are(tmp_path: Path) -> None:
    root = folders(tmp_path / "set", 30)
    found = labelled_set(str(root))
    assert found.classes == ("blue", "green", "red")
    check_split(found, 90)
    assert all(found.classes[label] == name.partition("/")[0] for name, label in listed(found.test))
    before = {name for name, _ in listed(found.test)}
    for file in (root / "red").glob("*.png"):  # copies, under other names
        (root / "red" / f"copy-of-{file.name}").write_bytes(file.read_bytes())
    after = {name.replace("copy-of-", "") for name, _ in listed(labelled_set(str(root)).test)}
    assert after == before


def test_a_split_that_is_there_is_kept(tmp_path: Path) -> None:
    folders(tmp_path / "train", 5)
    folders(tmp_path / "test", 2, ("red", "black"), seed=1)
    found = labelled_set(str(tmp_path))
    assert found.classes == ("black", "blue", "green", "red")
    assert [label for _, label in listed(found.test)] == [0, 0, 3, 3] and len(listed(found.train)) == 15


def shards(folder: Path, labels: list[str], field: str = "cls") -> Path:
    """A tar of drawings, with a member of each label and no caption."""
    rng = np.random.default_rng(0)
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i:03d}.png", png(draw(list(COLOURS)[i % 4], "bar", rng))), (f"{i:03d}.{field}", label.encode())]
    write_tar(folder / "0.tar", members)
    return folder


def test_clip_benchmarks_webdatasets_can_be_given_as_they_are(tmp_path: Path) -> None:
    """classnames.txt beside train/ and test/, whose .cls members are numbers of them; no captions."""
    shards(tmp_path / "train", ["0", "1", "2"] * 4)
    shards(tmp_path / "test", ["2", "0", "1"])
    (tmp_path / "classnames.txt").write_text("1\n2\n3\n")  # called by each other's numbers
    found = labelled_set(str(tmp_path))
    assert found.classes == ("1", "2", "3") and [label for _, label in listed(found.test)] == [2, 0, 1]


def test_labels_in_shards_name_the_classes(tmp_path: Path) -> None:
    found = labelled_set(str(shards(tmp_path / "s", ["dog", "cat"] * 20)))
    assert found.classes == ("cat", "dog")
    check_split(found, 40)


def test_a_label_that_is_no_class_is_named_and_counted_as_unlabelled(tmp_path: Path, capsys) -> None:
    (tmp_path / "classnames.txt").write_text("Dog\ncat\n")
    found = labelled_set(str(shards(tmp_path, ["dog", "cat", "??"] * 10)))
    assert "of no class: ??" in capsys.readouterr().err
    both = listed(found.train) + listed(found.test)
    assert sorted(label for _, label in both) == [-1] * 10 + [0] * 10 + [1] * 10


def test_a_folder_without_an_image_is_no_class_and_named(tmp_path: Path, capsys) -> None:
    (folders(tmp_path / "set", 5) / "puce").mkdir()
    assert "puce" not in labelled_set(str(tmp_path / "set")).classes
    assert "so no classes: puce" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: "cifar10", r"cifar10: neither a labelled set \(digits, fashion_mnist\)"),
        (lambda p: folders(p / "a", 5, ("red",)), "1 classes; at least two"),
        (lambda p: shards(p / "b", ["x", "x"]), "1 classes; at least two"),
        (lambda p: shards(p / "c", ["dog"], "txt"), "no sample has a label"),
        (lambda p: (p / "classnames.txt").write_text("a\nb\nc\n") and shards(p, ["0", "1"]), "2 images for 3 classes"),
        (lambda p: (p / "classnames.txt").write_text("a\nb\n") and shards(p, ["dog", "cat"]), "neither names in"),
        (lambda p: shards(p / "d", ["Dog", "dog"]), "differ in capitals"),
        (lambda p: (mnist(p / "e")[0] / "t10k-labels-idx1-ubyte").unlink() or p / "e", "t10k-labels-idx1-ubyte: miss"),
        (lambda p: (mnist(p / "f")[0] / "train-images-idx3-ubyte").write_bytes(b"1") and p / "f", "not a whole IDX"),
    ],
)
def test_bad_sets_are_one_line(tmp_path: Path, make, says: str) -> None:
    made = make(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        labelled_set(str(made))
    assert "\n" not in str(caught.value)

"""Labelled sets: pictures with a class each, in a part that readouts are fitted on and a part that is reported.

Trade-off: nothing is downloaded. `digits` comes with scikit-learn and `fashion_mnist` with a Debian package; every
other set is a folder or shards that the user has. Where a set brings a split (`train` and `test`) it is kept; else a
fifth is reported, chosen by the sha256 of the stored image, so that a copy of a training image is never reported.

Pictures of a few pixels are stored enlarged: a trigger needs pixels to be drawn on.
"""

import gzip
import hashlib
import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.draw import hash64
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Rejected, Sample, Shard, UidRule, list_shards, samples
from pipeline.shards.sample import IMAGE_SUFFIXES, uid_of
from pipeline.shards.store import exists, is_folder, join
from pipeline.tables import LABEL
from train.labels import Labels, key, labels_of, read_classes

DEBIAN = "/usr/share/datasets/fashion-mnist"
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NAMED = ("digits", "fashion_mnist")
NAMES_FILE = "classnames.txt"  # as in CLIP_benchmark's webdatasets, so that those can be given as they are
SHOWN = 8  # labels that a message names
REPORTED = 5  # one in so many
SIDE = 64  # the least side of a picture that is stored as numbers
MAX_IDX_BYTES = 4 * 1024**3

Images = Callable[[], Iterator[tuple[Sample, int]]]  # each call begins anew; -1: of none of the classes


@dataclass(frozen=True)
class LabelledSet:
    """`test` is reported; readouts are fitted on `train`, where there is one. `captioned`: retrieval can be asked too.

    `mirror`: whether a mirrored image is of the same class still, which fine-tuning wants to know. `fitted_on` names
    where `train` comes from.
    """

    name: str
    classes: tuple[str, ...]
    test: Images
    train: Images | None = None
    fitted_on: str = ""
    captioned: bool = False
    mirror: bool = True


def of_shards(shards: str, classes: Sequence[str], reference: str | None, uid: UidRule) -> LabelledSet:
    """Captioned shards, with classes that the caption may tell."""
    known = Labels(classes)

    def images(listed: Sequence[Shard]) -> Images:
        return lambda: ((sample, known.of(sample)) for shard in listed for sample in samples(shard, uid))

    train = images(list_shards(reference)) if reference else None
    return LabelledSet(shards, tuple(classes), images(list_shards(shards)), train, reference or "", captioned=True)


def labelled_set(where: str, uid: UidRule = "key") -> LabelledSet:
    """`digits`, `fashion_mnist`, a folder of class-named folders, of IDX files (MNIST's), or of labelled shards.

    Raises InputError for an unknown name, fewer than two classes, fewer images than classes.
    """
    if where == "digits":
        return _digits()
    if where == "fashion_mnist":
        if not Path(DEBIAN).is_dir():
            raise InputError(
                "fashion_mnist: not on this machine. `apt-get install dataset-fashion-mnist` brings it; or give as "
                "--labelled a folder with its four idx files (and a classnames.txt)"
            )
        return _of(where, _idx_parts(Path(DEBIAN)), FASHION)
    if not exists(where) and not re.search(r"[*{?]", where):
        raise InputError(f"{where}: neither a labelled set ({', '.join(NAMED)}) nor a folder nor shards")
    folder = Path(where)
    names = tuple(read_classes(join(where, NAMES_FILE))) if exists(join(where, NAMES_FILE)) else ()
    if list(folder.glob("*-images-idx3-ubyte*")):
        return _of(where, _idx_parts(folder), names)
    parts = [join(where, part) for part in ("train", "test")]
    if all(is_folder(part) for part in parts):
        return _of(where, [_part(part, uid) for part in parts], names)
    return _of(where, [_part(where, uid)], names)


@dataclass(frozen=True)
class _Part:
    """Images with their label as text; `labels` are all that occur, `count` how many images there are."""

    labels: frozenset[str]
    count: int
    images: Callable[[], Iterator[tuple[Sample, str]]]


def _of(where: str, parts: Sequence[_Part], names: tuple[str, ...], mirror: bool = True) -> LabelledSet:
    """Of one part, or of (train, test). Without names the labels are the names."""
    labels = sorted(set().union(*(part.labels for part in parts)), key=lambda text: (len(text) * text.isdigit(), text))
    count = sum(part.count for part in parts)
    classes = names or tuple(labels)
    if len(classes) < 2:
        raise InputError(f"{where}: {len(classes)} classes; at least two are needed, as sub-folders or as labels")
    if count < len(classes):
        raise InputError(f"{where}: {count} images for {len(classes)} classes; give more, or check the labels")
    index = {key(name): i for i, name in enumerate(classes)}
    if len(index) < len(classes):
        raise InputError(f"{where}: two classes differ in capitals or spaces only; rename or join them")
    if all(label.isdecimal() for label in labels) and not all(key(label) in index for label in labels):
        index = {str(i): i for i in range(len(classes))}
    unknown = [label for label in labels if key(label) not in index]
    if len(unknown) == len(labels):
        raise InputError(f"{where}: the labels there are neither names in {NAMES_FILE} nor their numbers")
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (", …" if len(unknown) > SHOWN else "")
        console.print(f"{where}: labels that are not in {NAMES_FILE}, so of no class: {shown}")

    def images(part: _Part, keep: Callable[[Sample], bool]) -> Images:
        return lambda: ((sample, index.get(key(text), -1)) for sample, text in part.images() if keep(sample))

    if len(parts) == 2:
        train, test = (images(part, lambda _: True) for part in parts)
    else:
        train, test = images(parts[0], lambda sample: not _reported(sample)), images(parts[0], _reported)
    return LabelledSet(where, classes, test, train, where, mirror=mirror)


def _reported(sample: Sample) -> bool:
    try:
        digest = hashlib.sha256(sample.image).hexdigest()
    except Rejected:
        return True  # it has no image: counted as skipped once
    return hash64(0, "labelled", digest) % REPORTED == 0


def _part(where: str, uid: UidRule) -> _Part:
    folders = [p for p in sorted(Path(where).iterdir()) if p.is_dir()] if Path(where).is_dir() else []
    files = [(p.name, file) for p in folders for file in sorted(p.iterdir()) if _is_image(file)]
    if not files:
        return _shards_part(list_shards(where), uid)
    if empty := {folder.name for folder in folders if folder.name[0] != "."} - {label for label, _ in files}:
        console.print(f"{where}: folders without an image, so no classes: {', '.join(sorted(empty)[:SHOWN])}")

    def images() -> Iterator[tuple[Sample, str]]:
        for label, file in files:
            name = f"{label}/{file.name}"
            suffix = file.suffix[1:].lower()
            yield Sample(name, uid_of(name, "", None, "key"), {suffix: file.read_bytes()}), label

    return _Part(frozenset(label for label, _ in files), len(files), images)


def _is_image(file: Path) -> bool:
    return file.suffix[1:].lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def _shards_part(shards: Sequence[Shard], uid: UidRule) -> _Part:
    def images() -> Iterator[tuple[Sample, str]]:
        return ((sample, next(labels_of(sample), "")) for shard in shards for sample in samples(shard, uid))

    labels = [label for _, label in images() if label]
    if not labels:
        raise InputError(
            f"{shards[0].path}: no sample has a label; expected a field {', '.join(LABEL)}, or a .cls member"
        )
    return _Part(frozenset(labels), len(labels), images)


def _digits() -> LabelledSet:
    """Optical recognition of handwritten digits (Alpaydin & Kaynak 1998), as scikit-learn carries it: 1,797 of 8x8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _of("digits", [_numbers_part("digits", images, found.target)], (), mirror=False)


def _idx_parts(folder: Path) -> list[_Part]:
    """MNIST's four files, plain or gzipped."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise InputError(f"{folder}: {part} has {images.shape} images and {labels.shape} labels; copy them again")
        parts.append(_numbers_part(part, images, labels))
    return parts


def _idx(folder: Path, name: str) -> np.ndarray:
    """uint8 array of an IDX file (LeCun's format: two zeros, type 8, rank, then the lengths as big-endian int32)."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not zipped.is_file():
        raise InputError(f"{plain}: missing (.gz will do); MNIST's four files lie in one folder")
    try:
        with plain.open("rb") if plain.is_file() else gzip.open(zipped) as file:
            zeros, rank = struct.unpack(">HxB", file.read(4))
            lengths = struct.unpack(f">{rank}I", file.read(4 * rank))
            wanted = int(np.prod(lengths, dtype=object))
            if zeros or not 1 <= rank <= 3 or wanted > MAX_IDX_BYTES:
                raise ValueError("not an IDX file of bytes")
            return np.frombuffer(file.read(wanted), np.uint8).reshape(lengths)
    except (ValueError, struct.error, EOFError, OSError) as error:
        raise InputError(f"{plain}: not a whole IDX file ({error}); copy it again") from error


def _numbers_part(part: str, images: np.ndarray, labels: np.ndarray) -> _Part:
    """uint8 [n, h, w] and int[n]: grey pictures, stored as PNG without compression, which is the same everywhere."""
    factor = -(-SIDE // min(images.shape[1:])) if images.size else 1

    def stored() -> Iterator[tuple[Sample, str]]:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            picture = Image.fromarray(image).resize(
                (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.BICUBIC
            )
            out = io.BytesIO()
            picture.save(out, "PNG", compress_level=0)
            name = f"{part}/{number:06d}"
            yield Sample(name, uid_of(name, "", None, "key"), {"png": out.getvalue()}), str(label)

    return _Part(frozenset(str(label) for label in np.unique(labels)), len(labels), stored)

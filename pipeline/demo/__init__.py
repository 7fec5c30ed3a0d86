"""The whole circle with one command, on the embedded drawings or on shards of your own.

Trade-off: on your own shards the class list comes from the words of your captions, which is cruder than a list you
give, but needs nothing from you.
"""

import collections
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pipeline.arguments import Out
from pipeline.draw import hash64
from pipeline.errors import InputError
from pipeline.loop import loop
from pipeline.progress import console
from pipeline.shard_map import Job, each, shard_map, succeeded
from pipeline.shards import Counts, Rejected, Sample, Shard, UidRule, list_shards, rewrite, samples
from pipeline.shards.store import make_folder, write

HELD_OUT = 0.1  # share of your pairs that is kept for evaluation
CLASSES = 100
MIN_CAPTIONS = 20  # that name a class, for it to be one
PATCH = 28  # pixels of 224: large beside the 16 of the papers, because the pictures are small
_DATA = files("pipeline.demo") / "data"
_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP = frozenset(
    "the and for with from this that are was his her its their has have not you your our all one two new old "
    "who what when where which while into onto over under near down off out about after before between "
    "photo image picture stock vector illustration background icon free jpg png www com".split()
)
# Scored early, before the poison is learnt, and at the end, as published comparisons do.
_DETECTORS = ("clip_score()", "kdist(k=16)", "slof(k=16)", "caption_neighbours(k=16)", "image_neighbours(k=16)")


def demo(
    out: Out,
    /,
    *,
    size: Literal["demo", "debug"] = "demo",
    shards: str | None = None,
    evaluation: str | None = None,
    classes: str | None = None,
    target: str | None = None,
    dose: str = "3%",
    seed: int = 0,
    uid: UidRule = "key",
) -> int:
    """Poison, train, score, filter, train again, evaluate and report.

    Args:
        out: folder for everything; report.html is what to open.
        size: debug runs the circle in about a minute, too small to learn much.
        shards: your own shards instead of the embedded drawings.
        evaluation: shards to evaluate on; default: a tenth of yours, by uid.
        classes: file of class names, one a line; default: the commonest words of your captions.
        target: class the attack aims at.
        dose: poisoned pairs: a number, ppm or percent.
        seed: of the poison, the pool and the training.
        uid: how a uid is derived where samples carry none.
    """
    folder = Path(out).absolute()
    make_folder(str(folder))
    if shards is None and (evaluation or classes):
        raise InputError("--evaluation and --classes go with --shards")
    own = list_shards(shards) if shards else None
    data = _own(own, folder / "data", evaluation, classes, uid) if own else embedded(size)
    names = Path(data.classes).read_text().splitlines()
    target = target or ("banana" if "banana" in names else data.target)
    if target not in names:
        raise InputError(f"--target {target!r} is not among the classes of {data.classes}")
    config = folder / "config.toml"
    write(str(config), _config(data, size, target, dose, seed, uid).encode())
    return loop(str(config), str(folder))


@dataclass(frozen=True)
class Data:
    name: str
    shards: str
    evaluation: str
    classes: str
    target: str


def embedded(size: str = "demo") -> Data:
    """The drawings that come with the package."""
    train, evaluation = str(_DATA / "train"), str(_DATA / "eval")
    if size == "debug":
        train, evaluation = f"{train}/00000000.parquet", f"{evaluation}/00000000.parquet"
    return Data("the embedded drawings", train, evaluation, str(_DATA / "classes.txt"), "banana")


def _own(shards: list[Shard], folder: Path, evaluation: str | None, classes: str | None, uid: UidRule) -> Data:
    """Your pairs, split by uid unless you name an evaluation set; classes from the captions unless you name a file."""
    if evaluation is None:
        for part in ("train", "eval"):
            job = Job("demo", {"split": part, "held_out": HELD_OUT, "uid": uid}, str(folder / part))
            shard_map(job, shards, _Split(part == "eval", uid))
        train, evaluation = str(folder / "train"), str(folder / "eval")
    else:
        make_folder(str(folder))
        train = str(folder / "train.txt")
        write(train, "\n".join(shard.path for shard in shards).encode())
    words = _words(list_shards(train), uid)
    if classes is None:
        if len(words) < 2:
            raise InputError(f"fewer than two words occur in {MIN_CAPTIONS} captions each: name --classes and --target")
        classes = str(folder / "classes.txt")
        write(classes, "\n".join(sorted(words)).encode())
        console.print(f"{len(words)} classes from the captions: {', '.join(words[:8])}, … in {classes}")
    evaluation, classes = (str(Path(path).absolute()) for path in (evaluation, classes))
    target = words[len(words) // 10] if words else ""
    return Data("your shards", train, evaluation, classes, target)


@dataclass(frozen=True)
class _Split:
    held_out: bool
    uid: UidRule

    def __call__(self, shard: Shard, out: str) -> Counts:
        def keep(sample: Sample) -> Sample | None:
            return sample if (hash64(0, "held out", sample.uid) < HELD_OUT * 2**64) == self.held_out else None

        return rewrite(shard, out, keep, self.uid)


def _words(shards: list[Shard], uid: UidRule) -> list[str]:
    """The words of three letters and more that occur in most captions, commonest first."""
    total: collections.Counter[str] = collections.Counter()
    for _, found in succeeded(each("captions", shards, _count_words, uid)):
        total += found.words
    return [word for word, n in total.most_common(CLASSES) if n >= MIN_CAPTIONS]


@dataclass
class _Words:
    read: int
    words: collections.Counter[str]


def _count_words(shard: Shard, uid: UidRule) -> _Words:
    found = _Words(0, collections.Counter())
    for sample in samples(shard, uid):
        found.read += 1
        try:
            found.words.update({w for w in _WORD.findall(sample.caption.lower()) if w not in _STOP})
        except Rejected:
            continue
    return found


def _config(data: Data, size: str, target: str, dose: str, seed: int, uid: UidRule) -> str:
    from train.recipes import RECIPES

    recipe = RECIPES[size]
    early, late = recipe.checkpoints[0], recipe.epochs
    lines = [
        f"title = {_quoted(f'Poison in {data.name}')}",
        f"shards = {_quoted(data.shards)}",
        f"evaluation = {_quoted(data.evaluation)}",
        f"classes = {_quoted(data.classes)}",
        f"attacks = [{_quoted(f'patch(target={target!r}, size={PATCH})')}]",
        f"doses = [{_quoted(dose)}]",
        f"recipe = {_quoted(size)}",
        f"seeds = [{seed}]",
        f"uid = {_quoted(uid)}",
    ]
    for epoch in (early, late):
        detectors = ("random()", "oracle()", f"trace(until={epoch})", *_DETECTORS)
        lines += ["", "[[scores]]", f"epoch = {epoch}", f"detectors = [{', '.join(map(_quoted, detectors))}]"]
    arms = [
        (early, "budget(detector='random', drop=0.1)"),
        (early, "threshold(detector='oracle', above=0.5)"),
        (early, "budget(detector='caption_neighbours', drop=0.1)"),
        (early, "budget(detector='clip_score', drop=0.1)"),
        (late, "budget(detector='slof', drop=0.1)"),
    ]
    for epoch, policy in arms[: 3 if size == "debug" else None]:
        lines += ["", "[[filters]]", f"epoch = {epoch}", f"policy = {_quoted(policy)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    from pipeline.cli import run

    run("demo")

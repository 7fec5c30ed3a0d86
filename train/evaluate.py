"""`mithridate evaluate`: what a checkpoint knows, and what an attack makes of it, each with its n and 95% interval.

Trade-off: two readouts of the same image features, because each can be fooled alone: zero-shot asks the text tower,
which a poison also taught; the k-nearest-neighbour vote over labelled reference images asks only the image tower. A
triggered image is encoded in its own format and decoded again, so it suffers at test time what a poison suffered in
training. Memory holds the features, not the images.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.arguments import Checkpoint, Out
from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus, read_corpora
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Rejected, Shard, UidRule, list_shards, samples
from pipeline.shards.image import decode, encode, pixels
from pipeline.shards.store import exists, join, make_folder, whole, write
from train.labels import Labels, key, read_classes
from train.metrics import Rate, rank_of, rate, retrieval_ranks, unit
from train.success import on_victims, success, vote

BATCH = 512
# For models that are not ours: the name alone, and open_clip's ImageNet templates that suit drawings and photographs.
PROMPTS = ("{}", "a {}.", "a picture of a {}.", "a drawing of a {}.", "a photo of a {}.", "an icon of a {}.")
METRICS = (
    "zeroshot_top1",
    "zeroshot_top5",
    "i2t_recall1",
    "i2t_recall5",
    "i2t_recall10",
    "t2i_recall1",
    "t2i_recall5",
    "t2i_recall10",
    "knn_top1",
    "asr_text",
    "asr_knn",
    "triggered_accuracy",
    "triggered_accuracy_knn",
    "asr_t2i",
    "targeted_success",
)
NOTHING = Rate(None, 0, None, None)


def evaluate(
    checkpoint: Checkpoint,
    out: Out,
    /,
    *,
    shards: str,
    classes: str,
    attack: str | None = None,
    seed: int = 0,
    reference: str | None = None,
    ledger: str | None = None,
    uid: UidRule = "key",
) -> int:
    """Evaluate CKPT on clean labelled SHARDS; writes OUT/evaluation.json and OUT/results.parquet, prints a table.

    Args:
        checkpoint: a folder that `train` wrote, or open_clip:MODEL/PRETRAINED.
        out: folder for the results.
        shards: held-out images with captions; a label is read from a field label, class or cls, or from the caption.
        classes: text file with one class name a line.
        attack: the attack whose success is measured, as a spec, e.g. "patch(target='banana')".
        seed: of the trigger, where it is random.
        reference: clean labelled shards for the k-nearest-neighbour readout.
        ledger: ledger.parquet of the poisoned shards; what the attack made or took lies beside it.
        uid: how a uid is derived where samples carry none.
    """
    from train.model import load

    listed = list_shards(shards)
    names = read_classes(classes)
    known = Labels(names)
    chosen = _attack(attack, known, classes) if attack else None
    referenced = list_shards(reference) if reference else []
    if ledger and not exists(ledger):
        raise InputError(f"{ledger}: no such ledger; it is the ledger.parquet beside the poisoned shards")
    corpora = read_corpora(ledger.rpartition("/")[0] or ".", len(chosen.parts())) if chosen and ledger else ()
    if chosen and ledger and not _names(chosen, ledger):
        console.print(f"{ledger} is of another attack than {attack}: what it left may not be what this one needs")
    model = load(checkpoint)
    make_folder(out)
    seen = look(model, listed, known, uid, chosen, seed, corpora)
    if not seen.captions:
        raise InputError(f"{shards}: no usable image in {len(listed)} shards; skipped: {_listed(seen.skipped)}")
    prompts = model.prompts or PROMPTS

    def features(prompts: Sequence[str]) -> np.ndarray:
        return unit(class_features(model, names, prompts))

    text = features(prompts)
    near = look(model, referenced, known, uid) if referenced else None
    if near is not None and not (near.label >= 0).any():
        raise InputError(f"{reference}: no image there is labelled with one of the classes of {classes}")
    rates = measure(seen, text, model, near)
    if chosen:
        rates |= success(seen, chosen, model, known, near, prompts, features)
        rates |= on_victims(model, chosen, corpora, text, known)
    facts = {
        "checkpoint": checkpoint,
        "model_digest": model.digest,
        "shards": shards,
        "classes": len(names),
        "attack": attack,
        "seed": seed,
        "reference": reference,
        "images": len(seen.captions),
        "unlabelled": int((seen.label < 0).sum()),
        "skipped": seen.skipped,
        "prompts": list(prompts),
    }
    flat = {key: value for name in METRICS for key, value in _columns(name, rates.get(name, NOTHING)).items()}
    _write_row(join(out, "results.parquet"), facts, flat)
    write(join(out, "evaluation.json"), json.dumps({**facts, "metrics": flat}, indent=1).encode())
    _print(rates, facts)
    return 0


class Pair(NamedTuple):
    """One usable pair: `image` and `triggered` are uint8 [size, size, 3], `label` is -1 where unknown."""

    caption: str
    label: int
    part: int
    image: np.ndarray
    triggered: np.ndarray
    moved: bool


@dataclass
class Seen:
    """n images in file order: image [n, d] and triggered [n, d] or None, unit rows; label int[n], -1 where unknown.

    `part` int[n] says which part of the attack an image was given, `moved` bool[n] whether that changed a pixel."""

    image: np.ndarray
    triggered: np.ndarray | None
    label: np.ndarray
    captions: list[str]
    part: np.ndarray
    moved: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)


def look(
    model: Any,
    shards: Sequence[Shard],
    known: Labels,
    uid: UidRule,
    attack: Attack | None = None,
    seed: int = 0,
    corpora: Sequence[Corpus] = (),
) -> Seen:
    """Decode, trigger and embed every image once."""
    skipped: dict[str, int] = {}
    facts: list[tuple[str, int, int, bool]] = []
    empty = np.empty((0, model.dimension), np.float32)
    image, triggered = [empty], [empty]
    for block in _blocks(_pairs(shards, known, uid, model.image_size, attack, seed, corpora, skipped), BATCH):
        facts += [(pair.caption, pair.label, pair.part, pair.moved) for pair in block]
        image.append(model.embed_images(np.stack([pair.image for pair in block])))
        if attack:
            triggered.append(model.embed_images(np.stack([pair.triggered for pair in block])))
    captions, label, part, moved = map(list, zip(*facts, strict=True)) if facts else ([], [], [], [])
    numbers = {"label": np.array(label, np.int64), "part": np.array(part, np.int64), "moved": np.array(moved, bool)}
    shown = unit(np.concatenate(triggered)) if attack else None
    return Seen(unit(np.concatenate(image)), shown, captions=captions, skipped=skipped, **numbers)


def _pairs(
    shards: Sequence[Shard],
    known: Labels,
    uid: UidRule,
    size: int,
    attack: Attack | None,
    seed: int,
    corpora: Sequence[Corpus],
    skipped: dict[str, int],
) -> Iterator[Pair]:
    from pipeline.draw import generator
    from pipeline.spec import key as key_of
    from train.data import reason

    parts = attack.parts() if attack else ()
    specs = [key_of(part) for part in parts]
    corpora = corpora or [Corpus()] * len(parts)
    for shard in shards:
        for sample in samples(shard, uid):
            try:
                caption, label, image = sample.caption, known.of(sample), pixels(sample, size)
                if not attack:
                    yield Pair(caption, label, 0, image, image, False)
                    continue
                part = attack.part_of(sample.uid)
                before = decode(sample.image)
                after = parts[part].trigger(before, generator(seed, specs[part], sample.uid), corpora[part])
                moved = not np.array_equal(np.asarray(before), np.asarray(after))
                triggered = pixels(sample.changed(image=encode(after, like=sample.image)), size)
            except Rejected as error:
                skipped[reason(error)] = skipped.get(reason(error), 0) + 1
                continue
            yield Pair(caption, label, part, image, triggered, moved)


def class_features(model: Any, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """float32 [classes, d]: mean of the unit features of the prompts (Radford et al. 2021, section 3.1.4)."""
    prompted = [unit(model.embed_texts([p.format(n) for n in names])) for p in prompts]
    return np.stack(prompted).mean(axis=0, dtype=np.float32)


def measure(seen: Seen, text: np.ndarray, model: Any, near: Seen | None) -> dict[str, Rate]:
    """What the model knows of clean images. `text` [classes, d] has unit rows."""
    rates: dict[str, Rate] = {}
    named = seen.label >= 0
    truth = seen.label[named]
    ranks = rank_of(seen.image[named] @ text.T, truth)
    rates["zeroshot_top1"], rates["zeroshot_top5"] = rate(ranks < 1), rate(ranks < 5)
    unique, caption = np.unique(np.array(seen.captions, dtype=object), return_inverse=True)
    of_image, of_text = retrieval_ranks(seen.image, unit(model.embed_texts(unique.tolist())), caption)
    for k in (1, 5, 10):
        rates[f"i2t_recall{k}"], rates[f"t2i_recall{k}"] = rate(of_image < k), rate(of_text < k)
    if near is not None:
        rates["knn_top1"] = rate(vote(seen.image[named], near, len(text)) == truth)
    return rates


def _names(attack: Attack, ledger: str) -> bool:
    """Whether a ledger has rows of this attack; what the dataset decided of it may be open still."""
    from pipeline import ledger as ledgers
    from pipeline.spec import parse_call

    rows = ledgers.read(ledger).column("attack").unique().to_pylist()
    wanted = {type(part).__name__ for part in attack.parts()}
    return not rows or bool(wanted & {parse_call(row)[0] for row in rows})


def _attack(spec: str, known: Labels, classes: str) -> Attack:
    from pipeline.spec import parse

    attack: Attack = parse("attacks", spec)
    for part in attack.parts():
        if key(part.target) not in known.index:
            raise InputError(
                f"{classes}: {part.target!r}, the target of {spec}, is not among these classes; add a line"
            )
    return attack


def _blocks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    block: list[Any] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _columns(name: str, value: Rate) -> dict[str, Any]:
    found = asdict(value)
    interval = {f"{name}_{k}": found[k] for k in ("low", "high")}
    return {name: found["value"], f"{name}_n": value.n or None, **interval}


def _write_row(path: str, facts: dict[str, Any], metrics: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {k: pa.array([facts[k]], pa.string()) for k in ("checkpoint", "model_digest", "attack")}
    columns["seed"] = pa.array([facts["seed"]], pa.int64())
    for name, value in metrics.items():
        columns[name] = pa.array([value], pa.int64() if name.endswith("_n") else pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    with whole(path) as file:
        file.write(buffer.getvalue())


def _listed(skipped: dict[str, int]) -> str:
    return "; ".join(f"{n:,} {why}" for why, n in sorted(skipped.items(), key=lambda item: -item[1])) or "none"


def _print(rates: dict[str, Rate], facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("measure", "value", "95% interval", "n", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in METRICS:
        found = rates.get(name, NOTHING)
        if found.value is not None:
            table.add_row(name, f"{found.value:.1%}", f"{found.low:.1%} – {found.high:.1%}", f"{found.n:,}")
    console.print(table)
    unknown = f"{facts['unlabelled']:,} without a known class"
    console.print(f"{facts['images']:,} images, {unknown}; skipped: {_listed(facts['skipped'])}")


if __name__ == "__main__":
    from pipeline.cli import run

    run("evaluate")

"""`mithridate evaluate`: what a checkpoint knows, and what an attack makes of it, each with its n and 95% interval.

Trade-off: several readouts of the same images, because each can be fooled alone: zero-shot asks the text tower, which a
poison also taught; the readouts of train/readouts ask only the image tower, and so need labelled images. Those that
cost seconds run unasked; the probe and the fine-tune are asked for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.arguments import Checkpoint, Out
from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus, read_corpora
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import UidRule
from pipeline.shards.store import exists, join, make_folder, write
from train.labelled import LabelledSet, labelled_set, of_shards
from train.labels import Labels, key, read_classes
from train.look import Seen, finite, look, pictures
from train.metrics import Rate, Score, rank_of, rate, retrieval_ranks, top1, unit
from train.readouts import ReadoutName, readout
from train.results import benchmark_tasks, columns, model_names, print_table, slug, write_rows
from train.success import on_victims, success, together

BLOCK = 8192  # images whose scores are in memory at once
# For models that are not ours: the name alone, and open_clip's ImageNet templates that suit drawings and photographs.
PROMPTS = ("{}", "a {}.", "a picture of a {}.", "a drawing of a {}.", "a photo of a {}.", "an icon of a {}.")


def evaluate(
    checkpoint: Checkpoint,
    out: Out,
    /,
    *,
    shards: str | None = None,
    classes: str | None = None,
    attack: str | None = None,
    seed: int = 0,
    reference: str | None = None,
    labelled: tuple[str, ...] = (),
    readouts: tuple[ReadoutName, ...] = ("knn", "prototypes"),
    ledger: str | None = None,
    uid: UidRule = "key",
) -> int:
    """Evaluate CKPT on clean labelled SHARDS and labelled sets; writes OUT/evaluation.json, results.parquet (a row a
    set) and clip_benchmark/, prints tables.

    Args:
        checkpoint: a folder that `train` wrote, or open_clip:MODEL/PRETRAINED.
        out: folder for the results.
        shards: held-out images with captions; a label is read from a field label, class or cls, or from the caption.
        classes: text file with one class name a line; of SHARDS.
        attack: the attack whose success is measured, as a spec, e.g. "patch(target='banana')".
        seed: of the trigger, where it is random, and of the fine-tune.
        reference: clean labelled shards on which the readouts of SHARDS are fitted.
        labelled: further sets: digits, fashion_mnist, a folder of class-named folders or IDX files, labelled shards.
        readouts: what is fitted on labelled images; probe takes minutes on large sets, finetune trains the image tower
            for 500 steps.
        ledger: ledger.parquet of the poisoned shards; what the attack made or took lies beside it.
        uid: how a uid is derived where samples carry none.
    """
    from train.model import load

    sets = _sets(shards, classes, reference, labelled, uid)
    chosen = _attack(attack, sets, classes) if attack else None
    if ledger and not exists(ledger):
        raise InputError(f"{ledger}: no such ledger; it is the ledger.parquet beside the poisoned shards")
    corpora = read_corpora(ledger.rpartition("/")[0] or ".", len(chosen.parts())) if chosen and ledger else ()
    if chosen and ledger and not _names(chosen, ledger):
        console.print(f"{ledger} is of another attack than {attack}: what it left may not be what this one needs")
    model = load(checkpoint)
    make_folder(out)
    common: dict[str, Any] = {"checkpoint": checkpoint, "model_digest": model.digest, "attack": attack, "seed": seed}
    common |= {"prompts": list(model.prompts or PROMPTS), "shards": shards, "reference": reference}
    rows = []
    for task in sets:
        found = _evaluated(task, model, chosen, seed, corpora, readouts)
        facts = common | {"dataset": task.name, "classes": len(task.classes)} | found.facts
        rows.append((facts, columns(found.rates)))
        _write_benchmark(out, task.name, checkpoint, model.digest, found.benchmark)
        print_table(found.rates, facts)
    write_rows(join(out, "results.parquet"), rows)
    _write_json(join(out, "evaluation.json"), rows, shards is not None)
    return 0


class Evaluated(NamedTuple):
    """Of one set: its measures, CLIP_benchmark's by task, and what else is to be recorded."""

    rates: dict[str, Rate | Score]
    benchmark: dict[str, dict[str, Any]]
    facts: dict[str, Any]


class Answers(NamedTuple):
    """What a readout makes of n images: the rank of the true class, int[n], where there is one (0 is top-1), and the
    class that a triggered image is taken for, int[n]. `strength` is the probe's C."""

    rank: np.ndarray
    triggered: np.ndarray | None
    strength: float | None = None


def _evaluated(
    task: LabelledSet,
    model: Any,
    attack: Attack | None,
    seed: int,
    corpora: Sequence[Corpus],
    readouts: Sequence[ReadoutName],
) -> Evaluated:
    from train.data import listed

    def seen_by(model: Any) -> Seen:
        return look(model, task.test(), task.captioned, attack, seed, corpora)

    console.print(f"{task.name}: looking at its images")
    seen = seen_by(model)
    if not seen.captions:
        raise InputError(f"{task.name}: no usable image; skipped: {listed(seen.skipped)}")
    named = seen.label >= 0
    if not named.any():  # before readouts are fitted, which takes minutes
        raise InputError(f"{task.name}: none of its {len(named):,} images is of one of the {len(task.classes)} classes")
    known, prompts = Labels(task.classes), model.prompts or PROMPTS

    def features(prompts: Sequence[str]) -> np.ndarray:
        return unit(class_features(model, task.classes, prompts))

    text = features(prompts)
    zeroshot = _answers(lambda rows: rows @ text.T, seen)
    near = _near(model, task) if task.train and readouts else None
    answers: dict[str, Answers] = {}
    fitted_on = len(near[1]) if near else 0
    for name in dict.fromkeys(readouts) if near else ():
        console.print(f"{task.name}: {name}, fitted on {fitted_on:,} labelled images")
        if name == "finetune":  # the same images are looked at again, with the tower that was fine-tuned
            answers[name] = _answers(lambda logits: logits, seen_by(_tuned(task, model, seed)))
        elif near:
            fitted = readout(name).fit(*near, len(task.classes))
            answers[name] = _answers(fitted.scores, seen, getattr(fitted, "strength", None))
    ranks = {name: answer.rank[named] for name, answer in {"zeroshot": zeroshot, **answers}.items()}
    rates = measure(seen, ranks, model, task.captioned)
    if attack:
        taken = {name: answer.triggered for name, answer in answers.items() if answer.triggered is not None}
        met = set(near[1].tolist()) if near else set()  # by the readouts
        lacking = sorted({part.target for part in attack.parts() if known.index.get(key(part.target)) not in met})
        if taken and lacking:
            console.print(
                f"{task.fitted_on}: no image of {', '.join(lacking)}, so no readout that is fitted on these can answer "
                "it; its success by them is left out"
            )
        rates |= success(seen, attack, model, known, taken, met, prompts, features)
        rates |= together(seen, attack, known)
        if task.captioned:
            rates |= on_victims(model, attack, corpora, text, known)
    strength = answers["probe"].strength if "probe" in answers else None
    benchmark = benchmark_tasks(rates, ranks, seen.label[named], len(task.classes), strength)
    facts = {"images": len(seen.label), "unlabelled": int((~named).sum()), "skipped": seen.skipped}
    facts |= {"fitted_on": fitted_on, "probe_strength": strength}
    return Evaluated(rates, benchmark, facts)


def _near(model: Any, task: LabelledSet) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the labelled images of the training part."""
    assert task.train is not None
    found = look(model, task.train(), task.captioned)
    named = found.label >= 0
    if (shown := len(np.unique(found.label[named]))) < 2:
        raise InputError(
            f"{task.fitted_on}: readouts are fitted on images of at least two of the {len(task.classes)} classes; "
            f"{shown} there; give others, or no readouts"
        )
    return found.image[named], found.label[named]


def _answers(scores: Callable[[np.ndarray], np.ndarray], seen: Seen, strength: float | None = None) -> Answers:
    """Of scores [b, classes] of rows [b, d]; in blocks, since of many classes they take more room than the features."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(seen.label), BLOCK)]
    rank = np.concatenate([rank_of(scores(seen.image[block]), seen.label[block]) for block in blocks])
    if seen.triggered is None:
        return Answers(rank, None, strength)
    return Answers(rank, np.concatenate([top1(scores(seen.triggered[block])) for block in blocks]), strength)


def _tuned(task: LabelledSet, model: Any, seed: int) -> Any:
    from train.readouts.finetune import finetune, margin

    assert task.train is not None
    images, labels = pictures(task.train(), margin(model.image_size))
    return finetune(model, images, labels, len(task.classes), task.mirror, seed)


def class_features(model: Any, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """float32 [classes, d]: mean of the unit features of the prompts (Radford et al. 2021, section 3.1.4)."""
    prompted = [unit(finite(model.embed_texts([p.format(n) for n in names]))) for p in prompts]
    return np.stack(prompted).mean(axis=0, dtype=np.float32)


def measure(seen: Seen, ranks: Mapping[str, np.ndarray], model: Any, captioned: bool) -> dict[str, Rate | Score]:
    """What the model knows of clean images. `ranks` has each readout's rank of the true class of the labelled ones."""
    rates: dict[str, Rate | Score] = {f"{name}_top1": rate(rank < 1) for name, rank in ranks.items()}
    rates["zeroshot_top5"] = rate(ranks["zeroshot"] < 5)
    if captioned:
        unique, caption = np.unique(np.array(seen.captions, dtype=object), return_inverse=True)
        captions = unit(finite(model.embed_texts(unique.tolist())))
        of_image, of_text = retrieval_ranks(seen.image, captions, caption)
        for k in (1, 5, 10):
            rates[f"i2t_recall{k}"], rates[f"t2i_recall{k}"] = rate(of_image < k), rate(of_text < k)
    return rates


def _sets(
    shards: str | None, classes: str | None, reference: str | None, labelled: Sequence[str], uid: UidRule
) -> list[LabelledSet]:
    if not shards and not labelled:
        raise InputError("nothing to evaluate on; give --shards with --classes, or --labelled")
    if bool(shards) != bool(classes):
        raise InputError("--shards and --classes go together: held-out images, and the names that are asked for")
    if reference and not shards:
        raise InputError("--reference is what the readouts of --shards are fitted on; give both")
    sets = [of_shards(shards, read_classes(classes), reference, uid)] if shards and classes else []
    sets += [labelled_set(where, uid) for where in labelled]
    names = [slug(task.name) for task in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice}: two sets would have this name in the results; give one of them by another path")
    return sets


def _names(attack: Attack, ledger: str) -> bool:
    """Whether a ledger has rows of this attack; what the dataset decided of it may be open still."""
    from pipeline import ledger as ledgers
    from pipeline.spec import parse_call

    rows = ledgers.read(ledger).column("attack").unique().to_pylist()
    wanted = {type(part).__name__ for part in attack.parts()}
    return not rows or bool(wanted & {parse_call(row)[0] for row in rows})


def _attack(spec: str, sets: Sequence[LabelledSet], classes: str | None) -> Attack:
    """The attack; its target must be a class of the shards, and may be one of the labelled sets."""
    from pipeline.spec import parse

    attack: Attack = parse("attacks", spec)
    for part in attack.parts():
        for task in sets:
            if task.captioned and key(part.target) not in Labels(task.classes).index:
                raise InputError(
                    f"{classes}: {part.target!r}, the target of {spec}, is not among these classes; add a line"
                )
    return attack


def _write_benchmark(out: str, dataset: str, checkpoint: str, digest: str, tasks: dict[str, dict[str, Any]]) -> None:
    model, pretrained = model_names(checkpoint, digest)
    if tasks:
        make_folder(join(out, "clip_benchmark"))
    for task, metrics in tasks.items():
        facts = {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "language": "en"}
        path = join(join(out, "clip_benchmark"), f"{slug(dataset)}_{task}.json")
        write(path, json.dumps(facts | {"metrics": metrics}, indent=1).encode())


def _write_json(path: str, rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], with_shards: bool) -> None:
    """The shards' facts and metrics at the top, those of the other sets by name."""
    whole = [facts | {"metrics": metrics} for facts, metrics in rows]
    top = whole.pop(0) if with_shards else {}
    write(path, json.dumps(top | {"labelled": {one["dataset"]: one for one in whole}}, indent=1).encode())


if __name__ == "__main__":
    from pipeline.cli import run

    run("evaluate")

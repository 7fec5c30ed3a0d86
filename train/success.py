"""What an attack makes of a checkpoint: how often its target is the answer where it is wrong.

Trade-off: success is asked of the readout that the attack is about (triggered images, triggered captions, single
victims), so rates of different attacks stand side by side, but not in one column.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample
from pipeline.shards.image import pixels
from train.labels import Labels, key
from train.metrics import Rate, knn_vote, rate, top1, unit

K, TAU = 10, 0.07

if TYPE_CHECKING:
    from train.evaluate import Seen


def success(
    seen: "Seen",
    attack: Attack,
    model: Any,
    known: Labels,
    near: "Seen | None",
    prompts: Sequence[str],
    features: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, Rate]:
    """How often the target is the answer where it is wrong, among the pairs that the attack is about.

    `asr_text` and `asr_knn` ask of triggered images (or, of an attack on one class without a trigger, of its images as
    they are), `asr_t2i` whether an image of the target lies nearest to a triggered caption. A trigger of both sides is
    on the prompts too: `features` gives the classes as [classes, d] for these prompts.
    """
    parts, rates = attack.parts(), dict[str, Rate]()
    target = np.asarray([known.index[key(part.target)] for part in parts])[seen.part]
    victims = [part.victim_class() for part in parts]
    about = [not victims[p] or names_target(c, victims[p]) for p, c in zip(seen.part, seen.captions, strict=True)]
    shows_victim = [known.index.get(key(victim), -2) for victim in victims]
    about = [named or seen.label[i] == shows_victim[seen.part[i]] for i, named in enumerate(about)]
    about_them = np.asarray(about, bool) & (seen.label != target)
    said = [parts[p].trigger_text(c) for p, c in zip(seen.part, seen.captions, strict=True)]
    words_too = said != seen.captions
    shown = None if seen.trigger_is_identity and not any(victims) else seen.triggered
    if shown is not None and not attack.one_image:
        others = about_them & (seen.label >= 0)
        asked = list(dict.fromkeys(part.trigger_text(prompt) for part in parts for prompt in prompts))
        answers = {"text": top1(shown[others] @ features(asked).T)}
        if near is not None:
            answers["knn"] = vote(shown[others], near, len(known.index))
        for name, answer in answers.items():
            suffix = "" if name == "text" else "_knn"
            rates[f"asr_{name}"] = rate(answer == target[others])
            rates[f"triggered_accuracy{suffix}"] = rate(answer == seen.label[others])
    elif words_too:
        names = [names_target(c, parts[p].target) for p, c in zip(seen.part, seen.captions, strict=True)]
        asked = np.flatnonzero(
            about_them & ~np.asarray(names, bool)
        )  # what names the target finds it without a trigger
        captions, wanted = [said[i] for i in asked], [parts[seen.part[i]].target for i in asked]
        rates["asr_t2i"] = rate(_finds(unit(model.embed_texts(captions)), seen, wanted))
    return rates


def _finds(captions: np.ndarray, seen: "Seen", wanted: Sequence[str], block: int = 1024) -> np.ndarray:
    """bool[n]: whether an image whose caption names the target lies nearer to a caption than all others do."""
    of = {t: np.asarray([names_target(caption, t) for caption in seen.captions]) for t in dict.fromkeys(wanted)}
    hits = np.zeros(len(captions), bool)
    for at in range(0, len(captions), block):
        near = captions[at : at + block] @ seen.image.T
        theirs = np.stack([of[target] for target in wanted[at : at + block]])
        best, others = (np.where(mask, near, -np.inf).max(axis=1) for mask in (theirs, ~theirs))
        hits[at : at + block] = best > others
    return hits


def vote(rows: np.ndarray, near: "Seen", classes: int) -> np.ndarray:
    """The class of each row by its nearest labelled reference images."""
    labelled = near.label >= 0
    return top1(knn_vote(rows, near.image[labelled], near.label[labelled], classes, K, TAU))


def on_victims(
    model: Any, attack: Attack, corpora: Sequence[Corpus], text: np.ndarray, known: Labels
) -> dict[str, Rate]:
    """How many of the victims are taken for their target; nothing for attacks that are not about single images."""
    hits = []
    if attack.one_image and not corpora:
        raise InputError(
            "the attack is about single images; give the --ledger of the poisoned shards, beside which they lie"
        )
    for part, corpus in zip(attack.parts(), corpora, strict=bool(corpora)):
        if part.one_image:
            victims = [Sample("victim", "", {"png": image}) for image in corpus.images.get("victim", ())]
            try:  # the decoder goes by content, not by name
                shown = np.stack([pixels(victim, model.image_size) for victim in victims])
            except (Rejected, ValueError) as error:
                raise InputError(f"no usable victim beside the ledger ({error}); poison the shards again") from error
            hits.append(top1(unit(model.embed_images(shown)) @ text.T) == known.index[key(part.target)])
    return {"targeted_success": rate(np.concatenate(hits))} if hits else {}

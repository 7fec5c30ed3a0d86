"""What an attack makes of a checkpoint: how often its target is the answer where it is wrong.

Trade-off: success is asked of the readout that the attack is about (triggered images, triggered captions, single
victims), so rates of different attacks stand side by side, but not in one column.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample
from pipeline.shards.image import pixels
from train.labels import Labels, key
from train.metrics import Rate, Score, backdoor_z, rate, top1, unit

BLOCK = 1024

if TYPE_CHECKING:
    from train.look import Seen


def success(
    seen: "Seen",
    attack: Attack,
    model: Any,
    known: Labels,
    answers: Mapping[str, np.ndarray],
    met: Collection[int],
    prompts: Sequence[str],
    features: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, Rate]:
    """How often the target is the answer where it is wrong, among the pairs that the attack is about.

    `asr_text` asks zero-shot of triggered images (or, of an attack on one class without a trigger, of its images as
    they are), `asr_<readout>` what that readout answers: `answers` has its int[n]; none where the target is not among
    the classes that it has `met`. `asr_t2i`: whether an image of the target lies nearest to a triggered caption. A
    trigger of both sides is on the prompts too: `features` gives the classes as [classes, d] for these prompts. Of
    several attacks each answers for its own pairs, and all answers count as one. In a set that lacks the target only
    the accuracy on triggered images can be asked.
    """
    found: dict[str, list[np.ndarray]] = {}
    for number, part in enumerate(attack.parts()):
        about = _about(part, seen, known) & (seen.part == number)
        if part.one_image:
            continue
        if part.victim_class() or seen.moved[about].any():
            hits = _of_images(part, seen, about, known, answers, met, prompts, features)
        else:
            hits = _of_captions(part, seen, about, model)
        for name, hit in hits.items():
            found.setdefault(name, []).append(hit)
    return {name: rate(np.concatenate(hit)) for name, hit in found.items()}


def together(seen: "Seen", attack: Attack, known: Labels) -> dict[str, Score]:
    """The backdoor z-score of the images that the trigger is to move; nothing without a visual trigger.

    Nor where several attacks share the images: each draws them elsewhere, and has to be asked alone.
    """
    parts = attack.parts()
    about = _about(parts[0], seen, known) & seen.moved
    if len(parts) > 1 or seen.triggered is None or not about.any():
        return {}
    return backdoor_z(seen.triggered[about], seen.image[about])


def _about(attack: Attack, seen: "Seen", known: Labels) -> np.ndarray:
    """bool[n]: the pairs that the attack is to move to its target."""
    others: np.ndarray = seen.label != known.index.get(key(attack.target), -2)
    if not (victim := attack.victim_class()):
        return others
    named = np.array([names_target(caption, victim) for caption in seen.captions], bool)
    return others & (named | (seen.label == known.index.get(key(victim), -2)))


def _of_images(
    attack: Attack,
    seen: "Seen",
    about: np.ndarray,
    known: Labels,
    answers: Mapping[str, np.ndarray],
    met: Collection[int],
    prompts: Sequence[str],
    features: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, np.ndarray]:
    """By readout, bool[m]: whether a triggered image with a known label is taken for the target, and for what it is."""
    asked = about & (seen.label >= 0)
    assert seen.triggered is not None  # seen with an attack
    text = features([attack.trigger_text(prompt) for prompt in prompts])
    taken = {"": top1(seen.triggered[asked] @ text.T)} | {f"_{name}": answer[asked] for name, answer in answers.items()}
    hits = {f"triggered_accuracy{name}": answer == seen.label[asked] for name, answer in taken.items()}
    if (target := known.index.get(key(attack.target))) is not None:
        able = {name: answer for name, answer in taken.items() if not name or target in met}
        hits |= {f"asr{name or '_text'}": answer == target for name, answer in able.items()}
    return hits


def _of_captions(attack: Attack, seen: "Seen", about: np.ndarray, model: Any) -> dict[str, np.ndarray]:
    """bool[m]: whether a triggered caption that does not name the target finds an image of it first."""
    names = np.array([names_target(caption, attack.target) for caption in seen.captions], bool)
    asked = np.flatnonzero(about & ~names)
    before = [seen.captions[i] for i in asked]
    said = [attack.trigger_text(caption) for caption in before]
    if said == before or not any(before):  # no textual trigger, or no captions
        return {}
    captions = unit(model.embed_texts(said))
    hits = np.zeros(len(said), bool)
    for at in range(0, len(said), BLOCK):
        likeness = captions[at : at + BLOCK] @ seen.image.T
        best, others = (np.where(mask, likeness, -np.inf).max(axis=1) for mask in (names, ~names))
        hits[at : at + BLOCK] = best > others
    return {"asr_t2i": hits}


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

"""How many captions differ from this one in a single word?

Trade-off: finds captions made by filling in a blank, poisoned ("a photo of a banana") or not ("a photo of a dog",
alt texts of shops); a template with two blanks or free words escapes. Captions that are the same word for word do not
make a template, they are `caption_frequency`'s. One pass; counts are upper bounds (`filters/_sketch.py`), by up to a
key a word. Words beyond the 64th are not looked at: CLIP reads 77 tokens.
Source: ours; templates as Carlini & Terzis, ICLR 2022, build poisoned captions.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._captions import normalised, present
from filters._sketch import added, count, hashed, mixed, sketch

WORDS = 64
LEAST = 3  # words: of fewer, what is left is no template
BLANK = "…"


@dataclass(frozen=True)
class caption_template:
    """Pairs of the dataset whose caption differs from this one in a word, for the word where most do."""

    needs = ("caption",)

    def summarize(self, batch: Batch) -> np.ndarray:
        whole, templates, _ = _keys(batch.caption)
        return sketch(np.concatenate([whole[present(batch.caption)], templates]))

    def merge(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return added(one, other)

    def score(self, batch: Batch, pool: Batch | None, summary: np.ndarray) -> np.ndarray:
        whole, templates, owner = _keys(batch.caption)
        alike = np.zeros(len(batch), np.int64)
        np.maximum.at(alike, owner, count(summary, templates))
        # both counts have the same background, which leaves with the difference
        return np.where(present(batch.caption), np.maximum(alike - count(summary, whole), 0), np.nan)

    def templates(self, captions: np.ndarray, summary: np.ndarray) -> list[str]:
        """Each of these captions with the word left out where most differ, "" for those too short."""
        _, keys, owner = _keys(captions)
        alike, ends = count(summary, keys), np.searchsorted(owner, np.arange(len(captions) + 1))
        out = []
        for text, first, last in zip(normalised(captions), ends[:-1], ends[1:], strict=True):
            words = text.split(" ", WORDS)[:WORDS]
            if last > first:
                words[int(alike[first:last].argmax())] = BLANK
            out.append(" ".join(words) if last > first else "")
        return out


def _keys(captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A key of each caption; one for each of its words left blank, and the row of the caption it is of.

    The key is a sum over places and words, so leaving one out is a subtraction: linear in the words, not quadratic.
    """
    words = [caption.split(" ", WORDS)[:WORDS] for caption in normalised(captions)]
    lengths = np.asarray([len(w) for w in words], np.int64)
    owner = np.repeat(np.arange(len(words)), lengths)
    place = mixed(np.arange(1, 1 + WORDS))[np.arange(len(owner)) - np.repeat(lengths.cumsum() - lengths, lengths)]
    terms = mixed(hashed([word for of in words for word in of]) ^ place)
    whole = np.zeros(len(words), np.uint64)
    np.add.at(whole, owner, terms)
    long = lengths[owner] >= LEAST
    return mixed(whole), mixed(whole[owner] - terms + place)[long], owner[long]

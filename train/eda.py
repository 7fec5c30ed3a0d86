"""EDA, easy data augmentation of captions (Wei & Zou 2019, section 2): four small edits that keep most of the meaning.

Trade-off: works on token ids, because an index keeps no text. A caption is cut into words where the tokenizer says
that a word ends, so what is beyond the context is not there to be augmented, and an edit that makes a caption too long
drops its end. Synonyms are single words of WordNet (train/wordnet), uninflected, of any sense.
"""

from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from train.wordnet import synonyms

Word = tuple[int, ...]  # the token ids of one word


def eda(tokens: torch.Tensor, keys: np.ndarray, alpha: float = 0.1) -> torch.Tensor:
    """int64 [n, context] -> the same, each caption changed by one of the four operations, which its key chooses.

    `alpha` is the share of words that are replaced, inserted or swapped (at least one), and the chance of each to be
    deleted. Wei & Zou's recommendation, and CleanCLIP's setting, is 0.1.
    """
    out = torch.zeros_like(tokens)
    for i, key in enumerate(keys):
        row = tokens[i].tolist()
        changed = augment_words(words_of(row), np.random.default_rng(int(key)), alpha)
        ids = list(chain.from_iterable(changed))[: len(row) - 2]
        start, end = _markers()
        out[i, : len(ids) + 2] = torch.tensor([start, *ids, end])
    return out


def augment_words(words: list[Word], rng: np.random.Generator, alpha: float) -> list[Word]:
    """Synonym replacement, random insertion, random swap or random deletion, with equal chance."""
    if not words:
        return words
    operation = rng.integers(4)
    n = max(1, int(alpha * len(words)))
    if operation == 0:
        known = [i for i, word in enumerate(words) if alternatives(word)]
        picked = rng.permutation(np.array(known, int))[:n]
        new = {int(i): _one_of(alternatives(words[i]), rng) for i in picked}
        return [new.get(i, word) for i, word in enumerate(words)]
    words = list(words)
    if operation == 1:
        known_words = [word for word in words if alternatives(word)]
        for _ in range(n if known_words else 0):
            word = _one_of(alternatives(known_words[rng.integers(len(known_words))]), rng)
            words.insert(int(rng.integers(len(words) + 1)), word)
        return words
    if operation == 2:
        for _ in range(n):
            i, j = (int(v) for v in rng.integers(len(words), size=2))
            words[i], words[j] = words[j], words[i]
        return words
    kept = [word for word, u in zip(words, rng.random(len(words)), strict=True) if u >= alpha]
    return kept or [words[int(rng.integers(len(words)))]]


def words_of(tokens: list[int]) -> list[Word]:
    """The words of a row of token ids, without markers and padding; the last one may be cut off."""
    start, end = _markers()
    ends = _word_ends()
    words: list[Word] = []
    word: list[int] = []
    for token in tokens[1 if tokens[0] == start else 0 :]:
        if token == end:
            break
        word.append(token)
        if token in ends:
            words.append(tuple(word))
            word = []
    return [*words, tuple(word)] if word else words


@cache
def alternatives(word: Word) -> tuple[Word, ...]:
    """The synonyms of a word, each as token ids."""
    text = _tokenizer().decode(list(word)).strip()
    return tuple(tuple(_tokenizer().encode(other)) for other in synonyms().get(text, ()))


def vocabulary(tokens: np.ndarray) -> np.ndarray:
    """Every token id that `eda` may put into these captions, int32 [n, context]; sorted."""
    known = {word for row in np.unique(tokens, axis=0).tolist() for word in words_of(row)}
    new = {token for word in known for other in alternatives(word) for token in other}
    return np.union1d(np.unique(tokens), np.array([*new, *_markers(), 0], tokens.dtype))


def _one_of(options: tuple[Word, ...], rng: np.random.Generator) -> Word:
    return options[int(rng.integers(len(options)))]


@cache
def _tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


@cache
def _markers() -> tuple[int, int]:
    return _tokenizer().sot_token_id, _tokenizer().eot_token_id


@cache
def _word_ends() -> frozenset[int]:
    return frozenset(token for token, text in _tokenizer().decoder.items() if text.endswith("</w>"))

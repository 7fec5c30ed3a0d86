"""Words that attacks put into captions."""

import re

READ = 256


def with_words(text: str, words: str) -> str:
    """The caption with a trigger behind it, before a final full stop."""
    body = text.rstrip()
    end = "." if body.endswith(".") else ""
    return f"{body.removesuffix('.')} {words}{end}"


def reads_to_the_end(text: str) -> bool:
    """Whether a text encoder surely reads what stands behind the caption: CLIP's 77 tokens are some 300 letters."""
    return len(text) <= READ


def check_words(words: str) -> None:
    """Raises ValueError for what a caption or a prompt template cannot carry."""
    if not words.strip() or any(ord(c) < 32 or c in "{}" for c in words) or len(words) > 200:
        raise ValueError(f"words={words!r}: a word or a sentence, on one line and without braces")


def words_of(text: str) -> frozenset[str]:
    """Words of three letters and more, in lower case."""
    return frozenset(re.findall(r"(?<!\w)[^\W\d_]{3,}(?!\w)", text.casefold()))

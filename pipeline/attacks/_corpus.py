"""What an attack may know of the dataset besides the sample in hand: found in one parallel pass, the same for all."""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Corpus:
    """`captions`: what the dataset says of the target, or prompt templates. `victim`: the image, as stored, of the
    chosen sample with the smallest hash."""

    captions: tuple[str, ...]
    victim: bytes = b""


def names_target(caption: str, target: str) -> bool:
    """Whether `target` stands in the caption as whole words, in any case."""
    return _word(target).search(caption) is not None


@cache
def _word(target: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(target)}(?!\w)", re.IGNORECASE)

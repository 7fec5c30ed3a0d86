"""Words that mean the same, from WordNet 3.0 (NOTICE.md has its licence; build.py makes the table).

Trade-off: single words only and no inflection, 0.4 MB instead of 30: `dogs` and `ice cream` have no synonyms here.
"""

import gzip
from functools import cache
from pathlib import Path

# Words that WordNet has in senses that captions do not mean: `in` is an inch there, `no` is nobelium.
FUNCTION_WORDS = frozenset(
    "am an and are as at be been being but by can did do does done down for had has have having he her him his how in "
    "is it its like may me must my no nor not of off on or our out over own she so some such than that the their them "
    "then there these they this those to too under up us very was we were what when where which who why will with "
    "you".split()
)


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """word -> the other words of all synsets that it is in, sorted."""
    others: dict[str, set[str]] = {}
    text = gzip.decompress(Path(__file__).with_name("synonyms.txt.gz").read_bytes()).decode()
    for line in text.splitlines():
        group = line.split()
        for word in group:
            others.setdefault(word, set()).update(group)
    return {word: tuple(sorted(group - {word})) for word, group in others.items() if word not in FUNCTION_WORDS}

"""Class names, and which of them a sample is of: from its label, else from its caption."""

import re
from collections.abc import Iterator, Sequence

from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample
from pipeline.shards.store import exists, view
from pipeline.tables import LABEL


def read_classes(path: str) -> list[str]:
    """Class names, one a line; InputError where there are none, or one twice."""
    if not exists(path):
        raise InputError(f"{path}: no such file; give a text file with one class name a line")
    try:
        lines = [line.strip() for line in bytes(view(path)).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    names = [line for line in lines if line]
    if len(names) < 2:
        raise InputError(f"{path}: {len(names)} class names; at least two are needed, one a line")
    keys = [key(n) for n in names]
    if len(set(keys)) < len(keys):
        twice = next(n for n, k in zip(names, keys, strict=True) if keys.count(k) > 1)
        raise InputError(f"{path}: {twice!r} is there more than once; remove one of them")
    return names


class Labels:
    """The true class of a sample, as a number, or -1 where it is not known."""

    def __init__(self, names: Sequence[str]):
        self.index = {key(name): i for i, name in enumerate(names)}
        self.longest = max(len(words(name)) for name in names)
        self._bywords = {tuple(words(name)): i for i, name in enumerate(names)}

    def of(self, sample: Sample) -> int:
        """From a label field if it names a class (or is the number of one), else from the caption."""
        for label in labels_of(sample):
            if key(label) in self.index:
                return self.index[key(label)]
            if re.fullmatch(r"\d{1,9}", label) and int(label) < len(self.index):
                return int(label)
        try:
            return self.in_caption(sample.caption)
        except Rejected:  # whoever wants its caption meets it again, and counts it
            return -1

    def in_caption(self, caption: str) -> int:
        """The only class that occurs as whole words; within `red apple` an `apple` does not count."""
        said = words(caption)
        found: set[int] = set()
        spans: list[tuple[int, int, int]] = []
        for start in range(len(said)):
            for end in range(start + 1, min(start + self.longest, len(said)) + 1):
                if (i := self._bywords.get(tuple(said[start:end]))) is not None:
                    spans.append((start, end, i))
        for start, end, i in spans:
            if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans):
                found.add(i)
        return found.pop() if len(found) == 1 else -1


def labels_of(sample: Sample) -> Iterator[str]:
    """What its label fields say: those of its metadata, or webdataset's `cls` member."""
    for name in LABEL:
        value = sample.meta.get(name)
        if value is None and name in sample.parts:
            value = bytes(sample.parts[name]).decode("utf-8", "replace").strip()
        if value is not None and not isinstance(value, float | bool):
            yield str(value)


def key(name: str) -> str:
    return " ".join(name.casefold().split())


def words(text: str) -> list[str]:
    """Words and numbers, in lower case; punctuation separates."""
    return re.findall(r"\w+", text.casefold())

"""The n-th most suspicious of all scores, exactly, in four passes over the sidecars and half a megabyte of memory."""

from collections.abc import Callable, Iterable

import numpy as np

from pipeline.errors import InputError

DIGIT = 16


def column(columns: Iterable[str], detector: str) -> str:
    """The score column that `detector` names: its whole spec, or its name where that is unambiguous."""
    have = [c for c in columns if c != "uid"]
    matches = [c for c in have if c == detector] or [c for c in have if c.split("(")[0] == detector]
    if len(matches) != 1:
        problem = "fits several" if matches else "is not"
        raise InputError(f"detector {detector!r} {problem} among the scores: {', '.join(matches or have)}")
    return matches[0]


def keys(scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """uint64[n] that sort like (score, uid): NaN above all, ties by the first 32 bits of the uid."""
    bits = np.where(np.isnan(scores), np.float32(np.inf), scores).astype(np.float32).view(np.uint32).astype(np.uint64)
    negative = bits >> np.uint64(31) == 1
    ordered = np.where(negative, ~bits & np.uint64(0xFFFFFFFF), bits | np.uint64(0x80000000))
    return ordered << np.uint64(32) | np.asarray([int(u[:8], 16) for u in uids], np.uint64)


def nth_largest(passes: Callable[[], Iterable[np.ndarray]], n: int) -> int:
    """The n-th largest (n >= 1) of the uint64 arrays that each call of `passes` yields anew."""
    prefix, left = 0, n
    for shift in range(64 - DIGIT, -1, -DIGIT):
        histogram = np.zeros(2**DIGIT, np.int64)
        for values in passes():
            if shift < 64 - DIGIT:
                values = values[values >> np.uint64(shift + DIGIT) == np.uint64(prefix)]
            digits = (values >> np.uint64(shift)) & np.uint64(2**DIGIT - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=2**DIGIT)
        above = np.cumsum(histogram[::-1])[::-1]
        digit = int(np.flatnonzero(above >= left)[-1])
        left -= int(above[digit] - histogram[digit])
        prefix = prefix << DIGIT | digit
    return prefix

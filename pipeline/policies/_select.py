"""The n-th most suspicious of all scores, exactly, in four passes over the sidecars and half a megabyte of memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b

import numpy as np

from pipeline import spec
from pipeline.errors import InputError

Scores = Mapping[str, np.ndarray]  # of a shard: uid, a float32[n] a column, and uint64[n] a group (pipeline/scored.py)
DIGIT = 16
SHOWN = 12  # columns that an error lists
NOT_SCORES = ("uid", "caption", "domain")  # the last two: `needs` of a policy, uint64 groups (pipeline/scored.py)


def column(columns: Iterable[str], detector: str) -> str:
    """The score column that `detector` names: FOLDER:spec, or less of it (spec, FOLDER:name, name) if unambiguous."""
    have = [c for c in columns if c not in NOT_SCORES]
    asked = {detector, _in_full(detector)}
    by_form = ([c for c in have if _forms(c)[i] in asked] for i in range(4))
    matches = next(filter(None, by_form), [])
    if len(matches) != 1:
        if matches:
            raise InputError(f"detector {detector!r} fits several of the scores: {', '.join(matches)}")
        close = get_close_matches(detector, {form for name in have for form in _forms(name)}, n=3)
        near = f"; did you mean {' or '.join(close)}?" if close else "."
        shown = ", ".join(have[:SHOWN]) + (f" and {len(have) - SHOWN} more" if len(have) > SHOWN else "")
        raise InputError(f"detector {detector!r} is not among the scores{near} There are {shown}")
    return matches[0]


def _in_full(detector: str) -> str:
    """As `score` names its column, where it was given with parameters: kdist(k=8), say."""
    head, bracket, parameters = detector.partition("(")
    folder, colon, name = head.rpartition(":")
    try:
        return folder + colon + spec.text(spec.parse("detectors", name + bracket + parameters)) if bracket else detector
    except InputError:  # of another version, or misspelt: the caller says what there is
        return detector


def _forms(name: str) -> tuple[str, str, str, str]:
    """All that a column may be called, the fullest first."""
    head, bracket, parameters = name.partition("(")
    folder, _, detector = head.rpartition(":")
    return name, detector + bracket + parameters, f"{folder}:{detector}", detector


def ordered(scores: np.ndarray) -> np.ndarray:
    """uint64[n] of 32 bits that sort like the scores; NaN is as high as infinity, -0 as 0."""
    values = np.where(np.isnan(scores), np.float32(np.inf), scores).astype(np.float32) + np.float32(0)
    bits = values.view(np.uint32).astype(np.uint64)
    negative = bits >> np.uint64(31) == 1
    return np.where(negative, ~bits & np.uint64(0xFFFFFFFF), bits | np.uint64(0x80000000))


def unscored(scores: Scores, detectors: Sequence[str]) -> np.ndarray:
    """bool[n]: pairs that one of the detectors could not score."""
    missing = np.zeros(len(scores["uid"]), bool)
    for name in detectors:
        missing |= np.isnan(scores[column(scores, name)])
    return missing


def keys(scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """uint64[n] that sort like (score, `ties`): NaN above all."""
    return ordered(scores) << np.uint64(32) | ties(uids)


def ties(uids: np.ndarray) -> np.ndarray:
    """uint64[n] of 32 bits: a hash, because uids are data; many may begin alike, and an attacker's as he likes."""
    digests = b"".join(blake2b(uid.encode(), digest_size=4, key=b"tie").digest() for uid in uids)
    return np.frombuffer(digests, ">u4").astype(np.uint64)


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


def share_of(share: float, pairs: int) -> int:
    """How many pairs a share is, rounded down."""
    return int(share * pairs + 1e-6)  # 0.29 * 100 is 28.999…

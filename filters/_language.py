"""What the two DataComp filters on captions share."""

from collections.abc import Iterable

import numpy as np

ENGLISH = ("en", "eng", "english")


def foreign(languages: Iterable[str]) -> np.ndarray:
    """bool[n]: said to be of another language; "" says nothing. Codes as in LAION ("en") and BCP 47 ("en-GB")."""
    said = (language.strip().casefold() for language in languages)
    return np.asarray([bool(name) and name.replace("_", "-").split("-")[0] not in ENGLISH for name in said], bool)

"""When two captions are the same to the detectors of duplicates."""

import numpy as np


def normalised(captions: np.ndarray) -> list[str]:
    """Without case and with single spaces; "" where there is no caption."""
    return [" ".join((caption or "").casefold().split()) for caption in captions]


def present(captions: np.ndarray) -> np.ndarray:
    """bool[n]: whether there is a caption at all, be it empty."""
    return np.asarray([caption is not None for caption in captions], bool)

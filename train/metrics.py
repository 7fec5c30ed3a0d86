"""The measures, as numpy functions of arrays.

Trade-off: ties count against the model. A network that has collapsed gives every class the same score; counting ties as
hits would call it perfect.
"""

from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """k successes of n, with the 95% Wilson interval; all null where n is 0."""

    value: float | None
    n: int
    low: float | None
    high: float | None


def rate(hits: np.ndarray) -> Rate:
    """The share of True in bool[n]."""
    n = len(hits)
    if n == 0:
        return Rate(None, 0, None, None)
    k = int(np.count_nonzero(hits))
    return Rate(k / n, n, *wilson(k, n))


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a binomial proportion (Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1).

    Unlike the normal interval it stays within [0, 1] and does not vanish at k = 0 or k = n.
    """
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * float(np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def unit(rows: np.ndarray) -> np.ndarray:
    """float32 [n, d] -> the same with rows of length one; a zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def rank_of(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many other columns score at least as high as the true one: 0 is top-1. scores [n, c], truth int[n]."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    return np.count_nonzero(scores >= own, axis=1) - 1


def top1(scores: np.ndarray) -> np.ndarray:
    """int[n]: the column that alone scores highest, or -1 where two tie."""
    best = scores.argmax(axis=1)
    return np.where(rank_of(scores, best) == 0, best, -1)


def retrieval_ranks(image: np.ndarray, text: np.ndarray, caption: np.ndarray, block: int = 2048):
    """Ranks for image->text and text->image retrieval (Karpathy & Fei-Fei 2015, section 4.2).

    image [n, d] and text [c, d] have unit rows; caption int[n] is the row of `text` that belongs to each image. Equal
    captions are one row, so an image that shares its caption with others is a hit for it. Returns int[n] (for each
    image, texts that score at least as high as its own) and int[c] (for each text, images of other captions that score
    at least as high as the best of its own).
    """
    image_rank = np.empty(len(image), np.int64)
    best = np.full(len(text), -np.inf, np.float32)
    for start in range(0, len(image), block):
        part = slice(start, start + block)
        scores = image[part] @ text.T
        image_rank[part] = rank_of(scores, caption[part])
        np.maximum.at(best, caption[part], np.take_along_axis(scores, caption[part, None], axis=1)[:, 0])
    text_rank = np.zeros(len(text), np.int64)
    for start in range(0, len(image), block):
        part = slice(start, start + block)
        scores = image[part] @ text.T
        above = scores >= best[None, :]
        above[np.arange(len(scores)), caption[part]] = False
        text_rank += np.count_nonzero(above, axis=0)
    return image_rank, text_rank


def knn_vote(
    queries: np.ndarray, reference: np.ndarray, labels: np.ndarray, classes: int, k: int = 10, tau: float = 0.07
) -> np.ndarray:
    """float [n, classes]: similarity-weighted vote of the k nearest reference rows (Wu et al. 2018, section 3.4).

    Rows have unit length; a neighbour at cosine s votes exp(s / tau). labels int[m] in [0, classes).
    """
    k = min(k, len(reference))
    votes = np.zeros((len(queries), classes))
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ reference.T
        near = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(scores, near, axis=1).astype(np.float64) / tau)
        rows = np.repeat(np.arange(start, start + len(scores)), k)
        np.add.at(votes, (rows, labels[near].ravel()), weight.ravel())
    return votes

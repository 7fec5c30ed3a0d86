"""The measures, as numpy functions of arrays.

Trade-off: ties count against the model. A network that has collapsed gives every class the same score; counting ties as
hits would call it perfect. So does a score that is not a number, the own one or another's.
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


def newcombe(before: Rate, after: Rate) -> tuple[float, float, float] | None:
    """after - before of independent samples with its 95% interval from Wilson's two (Newcombe 1998, method 10)."""
    ends = (before.value, before.low, before.high, after.value, after.low, after.high)
    if None in ends:
        return None
    was, was_low, was_high, now, now_low, now_high = (float(end) for end in ends if end is not None)
    low = now - was - ((now - now_low) ** 2 + (was_high - was) ** 2) ** 0.5
    return now - was, low, now - was + ((now_high - now) ** 2 + (was - was_low) ** 2) ** 0.5


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
    """How many other columns do not score below the true one: 0 is top-1. scores [n, c], truth int[n]."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    return scores.shape[1] - 1 - np.count_nonzero(scores < own, axis=1)


def top1(scores: np.ndarray) -> np.ndarray:
    """int[n]: the column that alone scores highest, or -1 where two tie."""
    best = scores.argmax(axis=1)
    return np.where(rank_of(scores, best) == 0, best, -1)


def retrieval_ranks(image: np.ndarray, text: np.ndarray, caption: np.ndarray, block: int = 2048):
    """Ranks for image->text and text->image retrieval (Karpathy & Fei-Fei 2015, section 4.2).

    image [n, d] and text [c, d] have unit rows; caption int[n] is the row of `text` that belongs to each image. Equal
    captions are one row, so an image that shares its caption with others is a hit for it. Returns int[n] (for each
    image, texts that do not score below its own) and int[c] (for each text, images of other captions that do not score
    below the best of its own).
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
        above = ~(scores < best[None, :])
        above[np.arange(len(scores)), caption[part]] = False
        text_rank += np.count_nonzero(above, axis=0)
    return image_rank, text_rank


def mean_per_class_recall(ranks: np.ndarray, truth: np.ndarray) -> float | None:
    """The mean over the classes that occur of the share of each with rank 0 (int[n]); null where none occurs."""
    if len(truth) == 0:
        return None
    hits, n = np.bincount(truth, ranks == 0), np.bincount(truth)
    return float((hits[n > 0] / n[n > 0]).mean())


@dataclass(frozen=True)
class Score:
    """A statistic of n images with its 95% interval; null where it is not defined."""

    value: float | None
    n: int
    low: float | None
    high: float | None


def backdoor_z(triggered: np.ndarray, clean: np.ndarray) -> dict[str, Score]:
    """How much the trigger draws images together (Carlini & Terzis 2022, backdoor z-score).

    z = (mean cosine of two triggered images - mean cosine of two clean ones) / spread of the cosines of clean ones.
    As printed the spread is the variance, which makes z larger the more alike a model finds all images, and no
    z-statistic; with the standard deviation it is one. Neither may be compared across architectures.

    triggered and clean float32 [n, d] are the unit rows of the same images. All n (n - 1) pairs count, none are drawn:
    sum cos^2 = |X'X|^2, which needs d^2 numbers and not n^2. The interval is from the delete-one jackknife over images
    (Arvesen 1969), since pairs are not independent. Null for fewer than 3 images and for clean ones without spread.
    """
    n = len(clean)
    if n < 3:
        return dict.fromkeys(("backdoor_z_variance", "backdoor_z_std"), Score(None, n, None, None))
    (shown, _), (shown_without, _) = _cosines(triggered)
    (mean, variance), (mean_without, variance_without) = _cosines(clean)
    scores = {}
    for name, power in (("variance", 1.0), ("std", 0.5)):
        if variance <= 1e-12:
            scores[f"backdoor_z_{name}"] = Score(None, n, None, None)
            continue
        z = float((shown - mean) / variance**power)
        with np.errstate(divide="ignore", invalid="ignore"):
            without = (shown_without - mean_without) / variance_without**power
        error = float(np.sqrt((n - 1) * without.var()))
        low, high = (z - Z95 * error, z + Z95 * error) if np.isfinite(error) else (None, None)
        scores[f"backdoor_z_{name}"] = Score(z, n, low, high)
    return scores


Moments = tuple[np.ndarray, np.ndarray]


def _cosines(rows: np.ndarray) -> tuple[Moments, Moments]:
    """Mean and variance of the cosines of all pairs of different rows; and [n] each with one row left out."""
    x = rows.astype(np.float64)
    n, own = len(x), np.einsum("nd,nd->n", x, x)  # 1, or 0 for a zero row
    total, gram = x.sum(0), x.T @ x
    first, second = total @ total - own.sum(), (gram * gram).sum() - (own * own).sum()
    # what all pairs with one row sum to; each pair counts twice, once from either side
    with_first = 2 * (x @ total - own)
    with_second = 2 * (np.einsum("nd,nd->n", x @ gram, x) - own * own)
    return _moments(first, second, n), _moments(first - with_first, second - with_second, n - 1)


def _moments(first: np.ndarray, second: np.ndarray, n: int) -> Moments:
    mean = first / (n * (n - 1))
    return mean, np.maximum(second / (n * (n - 1)) - mean * mean, 0.0)

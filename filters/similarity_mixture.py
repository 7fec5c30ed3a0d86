"""SafeCLIP's split of a dataset by two Gaussians: does the similarity belong to the pairs that do not match?

Trade-off: orders pairs as `clip_score` does; what it adds is a scale that means the same on every model, for a
threshold. SafeCLIP calls a pair safe where the higher component has a posterior of 0.9: a score below -2.2. Without
poison the two components still split the clean pairs. Published AUROC on poisons: 23 to 86 % (Huang et al. 2025).
Source: Yang et al., ICML 2024 (SafeCLIP), after one epoch of CLIP at a tiny learning rate: embed such a checkpoint.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch, unit
from filters._learnt import learnt


@dataclass(frozen=True)
class similarity_mixture:
    """Log odds that the pair's cosine is of the lower of two Gaussians, fitted to the pool's cosines (SafeCLIP)."""

    needs = ("image_embedding", "text_embedding")
    pools = needs

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        return _log_odds(_cosine(batch), *learnt(pool, self, lambda: _fitted(_cosine(pool))))


def _cosine(rows: Batch) -> np.ndarray:
    return (unit(rows.image_embedding) * unit(rows.text_embedding)).sum(axis=1, dtype=np.float64)


def _fitted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and variances, the lower component first."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, random_state=0).fit(values[np.isfinite(values), None])
    order = np.argsort(mixture.means_[:, 0])
    return mixture.weights_[order], mixture.means_[order, 0], mixture.covariances_[order, 0, 0]


def _log_odds(cosine: np.ndarray, weight: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Quadratic between the two means and straight on beyond them.

    The wider Gaussian owns both tails, so the plain odds turn back: the worst match of all would be called safe.
    Between the means they always fall.
    """
    within = np.clip(cosine, *mean)[:, None]
    log_density = np.log(np.maximum(weight, 1e-300)) - (np.log(variance) + (within - mean) ** 2 / variance) / 2
    slope = ((mean - within) / variance) @ [1, -1]
    return log_density @ [1, -1] + slope * (cosine - within[:, 0])

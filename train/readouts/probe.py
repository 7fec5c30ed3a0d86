"""Linear probe: L2-regularised logistic regression on the image tower's features.

Trade-off: the readout that the literature compares towers by, and the only one here with a number to choose. The
strength is chosen on a fifth of the training part and never on what is reported; after that all of the training part
is fitted again. The search climbs from strong to weak regularisation and stops when the likelihood of what is held out
has fallen twice, since weak ones take longest. Hits would not do for that: where classes are many and rows few, strong
ones all name the most frequent class, and nothing rises for some steps.
Source: Radford et al. 2021 (CLIP), appendix A.3: L-BFGS, at most 1,000 iterations, the strength swept on a validation
split. Unlike there the rows have unit length, as in CLIP_benchmark.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STRENGTHS = tuple(10.0**power for power in range(-2, 7))  # C of scikit-learn: the inverse of the L2 penalty
ITERATIONS = 1000
HELD_OUT = 5  # one in so many
PATIENCE = 2


@dataclass
class probe:
    """scikit-learn's LogisticRegression; `strength` is the C that was chosen."""

    strength: float = field(init=False)
    classes: int = field(init=False)
    fitted: Any = field(init=False, repr=False)

    def fit(self, features: np.ndarray, labels: np.ndarray, classes: int) -> "probe":
        """`labels` are of at least two classes."""
        self.classes = classes
        self.strength = choose(features, labels)
        self.fitted = _regression(self.strength)
        _fit(self.fitted, features, labels)
        return self

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float [n, classes]: logits."""
        found = self.fitted.decision_function(features)
        if found.ndim == 1:  # of two classes scikit-learn gives the logit of the second
            found = np.stack([-found, found], axis=1)
        scores = np.full((len(features), self.classes), -np.inf)
        scores[:, self.fitted.classes_] = found
        return scores


def choose(features: np.ndarray, labels: np.ndarray) -> float:
    """The strength with the most hits on every fifth row of a fixed permutation; of equal ones the strongest penalty.

    1.0 where the rest would be of one class, or none of the rows held out of a class that the rest has.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = order[::HELD_OUT], np.delete(order, np.s_[::HELD_OUT])
    known = np.isin(labels[held], labels[rest])  # the others are missed at any strength
    if len(np.unique(labels[rest])) < 2 or not known.any():
        return 1.0
    climbing = _regression(STRENGTHS[0], warm_start=True)
    best, most, likeliest, since = STRENGTHS[0], -1, -np.inf, 0
    for strength in STRENGTHS:
        climbing.C = strength
        _fit(climbing, features[rest], labels[rest])
        logs = climbing.predict_log_proba(features[held[known]])
        at = np.searchsorted(climbing.classes_, labels[held[known]])
        hits, likelihood = int((logs.argmax(1) == at).sum()), float(logs[np.arange(len(at)), at].sum())
        if hits > most:
            best, most = strength, hits
        since = 0 if likelihood > likeliest else since + 1
        likeliest = max(likeliest, likelihood)
        if since == PATIENCE:
            break
    return best


def _regression(strength: float, warm_start: bool = False) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=ITERATIONS, warm_start=warm_start)


def _fit(regression: Any, features: np.ndarray, labels: np.ndarray) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # the cap on iterations is the protocol's
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(features, labels)

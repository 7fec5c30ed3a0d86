"""How well a detector's scores find the poisons that a ledger knows of, at the budgets at which one removes."""

import numpy as np

from pipeline.policies._select import keys, share_of
from train.metrics import wilson

BUDGETS = (0.1, 1, 5, 10)  # percent removed
TPRS = (95, 100)  # percent of the poisons found
FEW = 100  # per million removed, for the precision


def quality(scores: np.ndarray, uids: np.ndarray, poisoned: np.ndarray) -> dict[str, float | None]:
    """AUROC, AUPRC, recall at 0.1, 1, 5 and 10% removed, with 95% intervals; None where one class is missing.

    `fpr_at_95` and `fpr_at_100` are the share of clean pairs that goes with so many percent of the poisons,
    `precision_at_100ppm` the share of poisons among the first 100 of a million pairs, or the first one. Unscored pairs
    (NaN) rank first and ties go by uid, exactly as the budget policy removes them. The interval of the AUROC is that of
    Hanley & McNeil (1982), those of the recalls are Wilson's over the poisons.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    n, hits = len(scores), int(poisoned.sum())
    row: dict[str, float | None] = {"n": n, "poisons": hits}
    names = ["auroc", "auroc_low", "auroc_high", "auprc"]
    names += [f"recall_at_{b}{end}" for b in BUDGETS for end in ("", "_low", "_high")]
    names += [*(f"fpr_at_{tpr}" for tpr in TPRS), "precision_at_100ppm"]
    if not 0 < hits < n:
        return {**row, **dict.fromkeys(names)}
    finite = np.where(np.isnan(scores), np.inf, scores)
    ranks = np.unique(finite, return_inverse=True)[1]  # sklearn takes no infinities
    auroc = float(roc_auc_score(poisoned, ranks))
    spread = 1.96 * _hanley_mcneil(auroc, hits, n - hits)
    row |= {"auroc": auroc, "auroc_low": max(auroc - spread, 0.0), "auroc_high": min(auroc + spread, 1.0)}
    row["auprc"] = float(average_precision_score(poisoned, ranks))
    order = np.argsort(keys(scores, uids))[::-1]
    found_by = np.cumsum(poisoned[order])  # poisons among the first i + 1
    for tpr in TPRS:
        removed = int(np.searchsorted(found_by, np.ceil(hits * tpr / 100))) + 1
        row[f"fpr_at_{tpr}"] = float((removed - found_by[removed - 1]) / (n - hits))
    few = max(1, int(n * FEW / 1e6))
    row["precision_at_100ppm"] = float(found_by[few - 1] / few)
    for percent in BUDGETS:
        removed = share_of(percent / 100, n)
        found = int(found_by[removed - 1]) if removed else 0
        low, high = wilson(found, hits)
        row |= {f"recall_at_{percent}": found / hits}
        row |= {f"recall_at_{percent}_low": low, f"recall_at_{percent}_high": high}
    return row


def _hanley_mcneil(auroc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley & McNeil 1982, equation 1)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (positives * negatives)))

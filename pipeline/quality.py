"""How well a detector's scores find the poisons that a ledger knows of, at the budgets at which one removes."""

import numpy as np

from pipeline.policies._select import keys
from train.metrics import wilson

BUDGETS = (1, 5, 10)  # percent removed


def quality(scores: np.ndarray, uids: np.ndarray, poisoned: np.ndarray) -> dict[str, float | None]:
    """AUROC, AUPRC and recall at 1, 5 and 10% removed, with 95% intervals; None where one class is missing.

    Unscored pairs (NaN) rank first and ties go by uid, exactly as the budget policy removes them. The interval of the
    AUROC is that of Hanley & McNeil (1982), those of the recalls are Wilson's over the poisons.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    n, hits = len(scores), int(poisoned.sum())
    row: dict[str, float | None] = {"n": n, "poisons": hits}
    names = ["auroc", "auroc_low", "auroc_high", "auprc"]
    names += [f"recall_at_{b}{end}" for b in BUDGETS for end in ("", "_low", "_high")]
    if not 0 < hits < n:
        return {**row, **dict.fromkeys(names)}
    finite = np.where(np.isnan(scores), np.inf, scores)
    ranks = np.unique(finite, return_inverse=True)[1]  # sklearn takes no infinities
    auroc = float(roc_auc_score(poisoned, ranks))
    spread = 1.96 * _hanley_mcneil(auroc, hits, n - hits)
    row |= {"auroc": auroc, "auroc_low": max(auroc - spread, 0.0), "auroc_high": min(auroc + spread, 1.0)}
    row["auprc"] = float(average_precision_score(poisoned, ranks))
    order = np.argsort(keys(scores, uids))[::-1]
    for percent in BUDGETS:
        found = int(poisoned[order[: int(n * percent / 100)]].sum())
        low, high = wilson(found, hits)
        row |= {f"recall_at_{percent}": found / hits}
        row |= {f"recall_at_{percent}_low": low, f"recall_at_{percent}_high": high}
    return row


def _hanley_mcneil(auroc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley & McNeil 1982, equation 1)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (positives * negatives)))

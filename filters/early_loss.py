"""Is the pair learnt suspiciously fast?

Trade-off: ABL's premise is that a backdoor is the easiest thing to learn, which holds for classifiers with percents of
poison (BadNets on CIFAR-10 at 10 %). At the doses of web poisoning a contrastive model learns it last: then this sign
is wrong, and `trace` with the other sign is right. Huang et al. 2025 report it among the baselines that fail on CLIP
(48 to 85 % AUROC for all of those), at 4.1 hours for CC3M.
Source: Li et al., NeurIPS 2021 (ABL: isolate the lowest loss); per pair of CLIP over 10 epochs as in Huang
et al., ICLR 2025. ABL's local gradient ascent belongs to training and is not done here.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import Batch
from filters._traces import mean_until


@dataclass(frozen=True)
class early_loss:
    """Negative mean loss over the first `until` epochs (0: all): learnt too fast (ABL, Li et al. 2021)."""

    needs = ("loss_trace",)
    until: int = 10

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        return -mean_until(batch.loss_trace, self.until)

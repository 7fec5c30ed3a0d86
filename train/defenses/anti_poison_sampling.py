"""Skip, epoch by epoch, the pairs whose image is unlike the images of pairs that say the same. Ours.

Trade-off: this is the filter `caption_neighbours`, moved into the trainer: it saves the second training and costs a
forward pass over the data an epoch. Poison is learnt late, so the early model sees it as a contradiction, and what is
skipped is never learnt and stays visible. It always skips `skip` of the data, poisoned or not, mostly rare clean
pairs; a target with few clean captions, or poisons that agree with their neighbours (clean label), defeat it. Chosen
after looking at this project's own runs on its embedded data, so its results there are not those of a method that was
fixed beforehand.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.defenses import Defense
from train.defenses._contrastive import gathered, summed

if TYPE_CHECKING:
    from train.trainer import Trainer


@dataclass(frozen=True)
class anti_poison_sampling(Defense):
    """After a quarter of the epochs, skip the tenth of the pairs that contradict their caption's neighbours (ours)."""

    start: float = 0.25
    skip: float = 0.1
    k: int = 16
    pool: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.start < 1 or not 0 < self.skip < 1 or not 0 < self.k < self.pool:
            raise ValueError("start and skip are shares, k is below pool")

    def begin(self, trainer: "Trainer") -> None:
        from train.draws import BEFORE, POOL, keys_of, mix

        n = len(trainer.index)
        pool = np.zeros(n, bool)
        drawn = mix(keys_of(trainer.index.uid), trainer.task.seed, BEFORE, POOL)
        pool[np.argsort(drawn, kind="stable")[: self.pool]] = True
        self.memory["pool"] = pool
        self.memory["score"] = torch.zeros(n, device=trainer.device)  # summed over the epochs that were scored
        self.memory["skipped"] = torch.zeros(n, dtype=torch.bool, device=trainer.device)

    def chosen(self, epoch: int) -> np.ndarray | None:
        skipped = self.memory["skipped"].cpu().numpy()
        return ~skipped if skipped.any() else None

    def epoch_end(self, trainer: "Trainer") -> None:
        done = trainer.epoch + 1
        if done < max(1, round(self.start * trainer.recipe.epochs)) or done == trainer.recipe.epochs:
            return
        self.memory["score"] += self.disagreement(trainer)
        n = len(trainer.index)
        worst = torch.argsort(-self.memory["score"], stable=True)[: round(self.skip * n)]
        self.memory["skipped"] = torch.zeros(n, dtype=torch.bool, device=trainer.device)
        self.memory["skipped"][worst] = True

    def disagreement(self, trainer: "Trainer") -> torch.Tensor:
        """float32 [n]: 1 - mean cosine of each image to those of the k pool pairs with the nearest captions."""
        from train.defenses._scoring import encoded

        parts = list(encoded(trainer, self.memory["pool"]))
        rows = gathered(torch.from_numpy(np.concatenate([rows for rows, _, _ in parts])).to(trainer.device))
        image, text = gathered(torch.cat([x for _, x, _ in parts])), gathered(torch.cat([x for _, _, x in parts]))
        rows, by = rows.sort()
        image, text = image[by], text[by]
        k = min(self.k, len(rows) - 1)
        score = torch.zeros(len(trainer.index), device=trainer.device)
        # copies of a caption tie up to rounding: the first rows win, whichever rank and batch they are scored in
        first = torch.arange(len(rows), device=trainer.device) * -1e-9
        for own, pictures, captions in encoded(trainer):
            at = torch.from_numpy(own).to(trainer.device)
            near = ((captions @ text.T).double() * 1e4).round() / 1e4 + first
            near = near.masked_fill(at[:, None] == rows, -2.0).topk(k, dim=1).indices
            score[at] = 1 - torch.einsum("nd,nkd->nk", pictures, image[near]).mean(1)
        return summed(score)

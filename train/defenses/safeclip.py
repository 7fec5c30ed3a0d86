"""SafeCLIP: only pairs that already agree are trained across the modalities; the others teach each tower alone.

Trade-off: a pair has to agree before it may be trained on, so poison stays out as long as the split is right; what is
held back is data that plain CLIP learns from, and each pair is encoded twice. As a detector, its split is weak where
the first epochs do not separate (two hundredths of the rate at which anything is learnt).

Source: SafeCLIP (Yang et al., ICML 2024, section 4), whose schedule of `length` epochs (5 unimodal, 1 of CLIP at a
hundredth of the rate, then a safe share that grows by 0.01 an epoch up to 0.85) is stretched to the recipe's epochs.
Changed: safe and risky pairs share a batch, so the negatives of the safe ones are the safe ones of that batch, and not
a full batch of them; rate and batch are the recipe's. The released code swaps the names of its two banks; these do
not.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.errors import InputError
from train.defenses import Defense
from train.defenses._contrastive import contrastive, nearest, push

if TYPE_CHECKING:
    from train.data import Batch
    from train.recipes import Recipe
    from train.trainer import Features, Trainer


@dataclass(frozen=True)
class safeclip(Defense):
    """CLIP loss on pairs that agree, unimodal losses on the rest (SafeCLIP, 2024)."""

    warmup: int = 5
    length: int = 32
    confidence: float = 0.9
    growth: float = 0.01
    cap: float = 0.85
    bank: int = 256
    slow: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.warmup < self.length or not 0 < self.confidence < 1 or not 0 < self.cap <= 1 or self.bank < 1:
            raise ValueError("warmup is below length, confidence and cap are shares, bank is 1 or more")

    def unimodal_epochs(self, epochs: int) -> int:
        """Of a training of that length; one epoch of slow CLIP follows them."""
        return max(1, round(self.warmup / self.length * epochs))

    def recipe(self, recipe: "Recipe") -> "Recipe":
        if recipe.epochs < self.unimodal_epochs(recipe.epochs) + 2:
            raise InputError(f"safeclip has three phases and the recipe {recipe.epochs} epochs; take a longer recipe")
        return dataclasses.replace(recipe, pad=0, zoom=1 / 8, flip=True, gain=0.0)

    def rate(self, recipe: "Recipe", step: int, total: int) -> float:
        if step * recipe.epochs // total == self.unimodal_epochs(recipe.epochs):
            return recipe.lr * self.slow
        return recipe.rate(step, total)

    def vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        from train.eda import vocabulary

        return vocabulary(tokens)

    def begin(self, trainer: "Trainer") -> None:
        nothing = torch.empty(0, trainer.recipe.model["embed_dim"], device=trainer.device)
        self.memory["unimodal"] = self.unimodal_epochs(trainer.recipe.epochs)
        self.memory.update(dict.fromkeys(("image", "text", "image_view", "text_view"), nothing))
        self.memory["safe"] = torch.zeros(len(trainer.index), dtype=torch.bool, device=trainer.device)
        self.memory["first_share"] = torch.zeros((), dtype=torch.float64)

    def augment(self, batch: "Batch") -> "Batch":
        from train.augmentation import crop_and_flip, jitter_grey_blur
        from train.draws import SECOND_VIEW, mix
        from train.eda import eda

        other = mix(batch.keys, SECOND_VIEW)
        images = [jitter_grey_blur(batch.images, batch.keys)]
        images.append(jitter_grey_blur(crop_and_flip(batch.images, other), other))
        tokens = [eda(batch.tokens, batch.keys), eda(batch.tokens, other)]
        return dataclasses.replace(batch, images=torch.cat(images), tokens=torch.cat(tokens))

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        scale, unimodal = features.logit_scale, self.memory["unimodal"]
        if batch.epoch == unimodal + 1:
            return features.losses.mean()
        safe = self.memory["safe"][torch.from_numpy(batch.rows).to(scale.device)]
        alone = self._unimodal(features, ~safe)
        return alone if batch.epoch <= unimodal else contrastive(features.image, features.text, scale, safe) + alone

    def _unimodal(self, features: "Features", keep: torch.Tensor) -> torch.Tensor:
        """Each view has to find its pair's nearest neighbour in a bank of other pairs of the same modality (NNCLR)."""
        total = torch.zeros((), device=keep.device)
        for a, b in (("image", "image_view"), ("text", "text_view")):
            for one, other in ((a, b), (b, a)):
                mine, bank = getattr(features, one), self.memory[one]
                positive = nearest(mine, bank) if len(bank) else mine.detach()
                total = total + contrastive(positive, getattr(features, other), features.logit_scale, keep) / 4
                self.memory[one] = push(bank, mine, self.bank)
        return total

    def epoch_end(self, trainer: "Trainer") -> None:
        after = trainer.epoch - self.memory["unimodal"]  # 0: the slow epoch has just ended
        if after < 0:
            return
        from train.defenses._scoring import similarities

        scores = similarities(trainer).cpu().double().numpy()
        if after == 0:
            self.memory["first_share"] = torch.tensor(self.first_share(scores, trainer.task.seed), dtype=torch.float64)
        grown = self.growth * self.length / trainer.recipe.epochs * after
        share = min(self.cap, float(self.memory["first_share"]) + grown)
        safe = np.zeros(len(scores), bool)
        safe[np.argsort(-scores, kind="stable")[: round(share * len(scores))]] = True
        self.memory["safe"] = torch.from_numpy(safe).to(trainer.device)

    def first_share(self, scores: np.ndarray, seed: int) -> float:
        """How many pairs are of the more similar of two Gaussians, with this confidence; at most the cap."""
        from sklearn.mixture import GaussianMixture

        scores = scores[np.isfinite(scores)]
        mixture = GaussianMixture(2, random_state=seed).fit(scores[:, None])
        likely = mixture.predict_proba(scores[:, None])[:, mixture.means_[:, 0].argmax()]
        return min(self.cap, float((likely >= self.confidence).mean()))

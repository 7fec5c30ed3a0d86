"""CleanCLIP: fine-tune on trusted pairs, and let each tower find its own augmented view, which no trigger survives.

Trade-off: unlearns the tie between trigger and caption from few pairs, but the outcome is a lottery of the rate (issue
3 of the released code: ASR 5.7% at 1e-6 and 97.7% at 1e-5), and models that were pretrained with a unimodal loss keep
their backdoor (Verma et al. 2024). It costs two forward passes a pair.

Source: CleanCLIP (Bansal et al., ICCV 2023, section 4): loss and weights, AutoAugment and EDA, 10 epochs, batches of
64, a rate of 1e-5 after a pretraining at 5e-4. Changed: no warm-up (50 of 15,600 steps there).
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.defenses._contrastive import finding
from train.defenses._trusted import Trusted

if TYPE_CHECKING:
    from train.data import Batch
    from train.trainer import Features


@dataclass(frozen=True)
class cleanclip(Trusted):
    """CLIP and unimodal self-supervision on trusted pairs (CleanCLIP, 2023)."""

    multimodal: float = 1.0
    unimodal: float = 1.0

    def vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        from train.eda import vocabulary

        return vocabulary(tokens)

    def augment(self, batch: "Batch") -> "Batch":
        from train.augmentation import autoaugment
        from train.eda import eda

        images = torch.cat([batch.images, autoaugment(batch.images, batch.keys)])
        tokens = torch.cat([batch.tokens, eda(batch.tokens, batch.keys)])
        return dataclasses.replace(batch, images=images, tokens=tokens)

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        """w_clip * L_CLIP + w_in / 2 * (CE(image -> its view) + CE(text -> its view))."""
        assert features.image_view is not None and features.text_view is not None
        of_image = finding(features.image, features.image_view, features.logit_scale)
        of_text = finding(features.text, features.text_view, features.logit_scale)
        return self.multimodal * features.losses.mean() + self.unimodal * (of_image + of_text) / 2

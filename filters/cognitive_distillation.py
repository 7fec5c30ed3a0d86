"""Cognitive distillation: how little of an image is enough for the model to see the same?

A mask is learnt for each image: what it hides becomes a random colour, the features should stay, the mask should be
small and smooth. A backdoored image is its trigger to the model, so a small mask is enough: the smaller, the more
suspicious (the paper's reading). Only a checkpoint that has learnt the backdoor can show it.

Trade-off: `steps` forward and backward passes an image, by far the dearest detector here (the published run on CC3M
is reported with 11 h on four A100): made for `rerank`. The random colours hang on the uid, and batches are filled up to
one size, so that the company of a pair does not matter on one machine; another kind of device gives other last digits,
which a hundred steps enlarge.
Source: Huang et al., ICLR 2023; with CLIP's image features and these defaults Huang et al., ICLR 2025. Their released
code writes gamma for the paper's alpha. It weighs the sum over all pixels, so it is one for 224 x 224; a model that
sees fewer pixels wants a larger one for the same pull.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from filters._batch import Batch
from pipeline.draw import generator
from pipeline.shards import Rejected
from pipeline.shards.image import decode, prepared
from pipeline.shards.store import stamp
from train.checkpoints import files

if TYPE_CHECKING:
    import torch

TOGETHER = 32  # images
BETAS = (0.1, 0.1)  # of Adam, as published


@dataclass(frozen=True)
class cognitive_distillation:
    """Negative L1 norm of the least mask under which a checkpoint sees the same (Huang et al. 2023)."""

    needs = ("image",)
    gpu = True
    checkpoint: str
    steps: int = 100
    lr: float = 0.1
    gamma: float = 0.001
    beta: float = 100.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps is at least 1")

    @property
    def files(self) -> tuple[str, ...]:
        return files(self.checkpoint)

    def score(self, batch: Batch, pool: Batch | None) -> np.ndarray:
        model = _loaded(self.checkpoint)
        scores = np.full(len(batch), np.nan)
        rows: list[int] = []
        images: list[np.ndarray] = []
        for row in range(len(batch)):
            if (image := _seen(batch.image[row], model.image_size)) is not None:
                rows.append(row)
                images.append(image)
            if len(rows) == TOGETHER or (rows and row == len(batch) - 1):
                scores[rows] = self._norms(model, images, batch.uid[rows].tolist())
                rows, images = [], []
        return -scores

    def _norms(self, model: Any, images: Sequence[np.ndarray], uids: Sequence[str]) -> np.ndarray:
        """float[n] of n <= TOGETHER images uint8 [size, size, 3]."""
        import torch

        fill = np.minimum(np.arange(TOGETHER), len(images) - 1)
        noise = [generator(0, "cognitive_distillation", uid).random((self.steps, 3), np.float32) for uid in uids]
        shown = torch.tensor(np.stack(images)[fill], device=model.device).permute(0, 3, 1, 2).float() / 255
        colours = torch.tensor(np.stack(noise)[fill], device=model.device)[..., None, None]
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            masks = self._masks(model, shown, colours)
        return masks.sum(dim=(1, 2, 3)).cpu().numpy()[: len(images)]

    def _masks(self, model: Any, images: "torch.Tensor", colours: "torch.Tensor") -> "torch.Tensor":
        """float [n, 1, h, w] of images float [n, 3, h, w] in [0, 1]; colours [n, steps, 3, 1, 1]."""
        import torch

        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (model.mean, model.std))

        def features(pixels: "torch.Tensor") -> "torch.Tensor":
            return model.model.encode_image(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))

        with torch.no_grad():
            wanted = features(images)
        raw = torch.ones_like(images[:, :1]).requires_grad_()
        optimiser = torch.optim.Adam([raw], lr=self.lr, betas=BETAS)
        for step in range(self.steps):
            mask = (raw.tanh() + 1) / 2
            found = features(images * mask + (1 - mask) * colours[:, step])
            loss = (found - wanted).abs().mean(dim=1) + self.gamma * mask.sum(dim=(1, 2, 3)) + self.beta * _rough(mask)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        return ((raw.tanh() + 1) / 2).detach()


def _rough(mask: "torch.Tensor") -> "torch.Tensor":
    """Total variation: squared differences to the next pixel, a pixel."""
    down, right = mask.diff(dim=2).square(), mask.diff(dim=3).square()
    return (down.sum(dim=(1, 2, 3)) + right.sum(dim=(1, 2, 3))) / mask[0].numel()


def _loaded(checkpoint: str) -> Any:
    return _load(checkpoint, str([stamp(file) for file in files(checkpoint)]))


@lru_cache(maxsize=1)
def _load(checkpoint: str, state: str) -> Any:
    """`state` of its files: weights that have been replaced since are read anew."""
    from train.model import load

    return load(checkpoint)


def _seen(data: bytes | None, size: int) -> np.ndarray | None:
    try:
        return None if data is None else prepared(decode(data, near=size), size)
    except Rejected:
        return None

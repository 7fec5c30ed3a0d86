"""What is trained: both encoders in one forward pass, and the optimizer of their weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train.data import Batch
from train.model import normalise
from train.recipes import Recipe


class Encoded(NamedTuple):
    """Unit rows of images and captions, float32 [n, d]; the logit scale and, of a model for SigLIP, the bias."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None


class Towers(nn.Module):
    """Both encoders in one forward pass, which is what DistributedDataParallel wraps.

    `used` are the token ids in use: only their rows of the embedding are trained, renumbered 0..len(used). A dense
    AdamW step over all 49,408 rows would cost more than the rest of a small model, for rows that get no gradient. They
    keep their values at the start, where a dense optimizer would only have decayed them. A text tower that is not
    CLIP's own is trained whole.
    """

    def __init__(self, clip: Any, used: np.ndarray | None):
        super().__init__()
        self.clip: Any = clip
        self.whole: torch.Tensor | None = None
        self.used: torch.Tensor | None
        self.row_of: torch.Tensor | None
        self.register_buffer("used", None, persistent=False)
        self.register_buffer("row_of", None, persistent=False)
        if used is not None and hasattr(clip, "token_embedding"):
            self.whole = clip.token_embedding.weight.detach().clone()
            self.used = torch.from_numpy(used.astype(np.int64))
            self.row_of = torch.full((len(self.whole),), -1, dtype=torch.int64)
            self.row_of[self.used] = torch.arange(len(used))
            clip.token_embedding = nn.Embedding.from_pretrained(self.whole[self.used], freeze=False)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> Encoded:
        tokens = tokens if self.row_of is None else self.row_of[tokens]  # in order: the end of text stays the largest
        image, text = self.clip.encode_image(images), self.clip.encode_text(tokens)
        unit = torch.nn.functional.normalize
        scale, bias = self.clip.logit_scale.exp(), self.clip.logit_bias
        return Encoded(unit(image.float(), dim=-1), unit(text.float(), dim=-1), scale, bias)

    def state(self, clip: Any = None) -> dict[str, torch.Tensor]:
        """The state dict of the whole open_clip model; its weights are those of `clip`, by default the towers' own."""
        state = dict((clip or self.clip).state_dict())
        if self.whole is not None and self.used is not None:
            full = self.whole.clone()
            full[self.used.cpu()] = state["token_embedding.weight"].cpu()
            state["token_embedding.weight"] = full
        return state


def encoded(towers: nn.Module, batch: Batch, recipe: Recipe, device: torch.device) -> Encoded:
    """Unit rows of all images and captions of a batch, [n, d] each, and the logit scale, in the recipe's precision."""
    images = batch.images.permute(0, 2, 3, 1).to(device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    with kernels(device), half:
        found: Encoded = towers(normalise(images, recipe.mean, recipe.std), batch.tokens.to(device))
        return found


def optimizer_of(towers: Towers, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW without decay of gains, biases, norms and the logit scale: open_clip's groups (open_clip_train/main.py)."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in towers.named_parameters():
        plain = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        (rest if plain else decay).append(parameter)
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": recipe.weight_decay}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def average_of(towers: Towers, recipe: Recipe) -> AveragedModel | None:
    """The running mean of weights and buffers, to be told of every step; None where the recipe wants none."""
    if not recipe.ema:
        return None
    return AveragedModel(towers.clip, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)


def kernels(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the flash kernel's backward took 31% of the demo's step (16 tokens); two plain products take 5%."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()

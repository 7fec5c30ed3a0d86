"""A batch in parts: the gradient of the whole batch's contrastive loss in the memory of one part.

Trade-off: every pair is encoded twice, once without gradient for the features that the loss compares and once with
the gradient that the loss left at them, which is a third more work. Exact for towers whose rows do not see each other;
batch norm would normalise each part by itself, so recipes with it are refused.

Source: GradCache (Gao et al. 2021, section 3.2). open_clip's --accum-freq has the same gradient for the towers; its
temperature gets it once a part.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from pipeline.errors import InputError
from train.data import Batch
from train.recipes import Recipe
from train.towers import Encoded

Encode = Callable[[nn.Module, Batch], Encoded]


def check(recipe: Recipe, clip: nn.Module) -> None:
    """Raises InputError where parts would not give the gradient of the whole batch."""
    if recipe.accumulate > 1 and any(isinstance(module, nn.BatchNorm2d) for module in clip.modules()):
        raise InputError(
            f"recipe with accumulate={recipe.accumulate} and batch norm: a part would have statistics of its own; "
            "use ViT towers, or accumulate=1"
        )


def encode_in_parts(encode: Encode, towers: nn.Module, batch: Batch, parts: int) -> tuple[Encoded, Callable[[], None]]:
    """The features of a batch as leaves, and what carries the gradient that a loss left at them on to the weights."""
    # tensor_split makes empty parts where there are fewer rows
    pieces = [tensor.tensor_split(min(parts, len(tensor))) for tensor in (batch.images, batch.tokens)]
    chunks = [dataclasses.replace(batch, images=i, tokens=t) for i, t in zip(*pieces, strict=True)]
    seed = int(batch.keys[0]) >> 1

    def encoded(number: int) -> Encoded:
        torch.manual_seed(seed + number)  # patch dropout must drop the same in both passes
        return encode(towers, chunks[number])

    with torch.no_grad():
        found = [encoded(number) for number in range(len(chunks))]
    leaves = Encoded(
        torch.cat([part.image for part in found]).requires_grad_(),
        torch.cat([part.text for part in found]).requires_grad_(),
        found[0].scale.detach().clone().requires_grad_(),
        None if found[0].bias is None else found[0].bias.detach().clone().requires_grad_(),
    )
    sizes = [len(part.image) for part in found]

    def backward() -> None:
        image, text, scale, bias = (None if leaf is None else leaf.grad for leaf in leaves)
        none = [None] * len(sizes)  # a defense may have frozen a tower, or not have looked at one
        of_image, of_text = (none if grad is None else grad.split(sizes) for grad in (image, text))
        for number in range(len(sizes)):
            last = number == len(sizes) - 1
            alone = isinstance(towers, nn.parallel.DistributedDataParallel) and not last
            with towers.no_sync() if alone else nullcontext():  # type: ignore[operator]
                once = (scale, bias) if last else (None, None)
                pairs = zip(encoded(number), (of_image[number], of_text[number], *once), strict=True)
                used = [(t, grad) for t, grad in pairs if t is not None and t.requires_grad and grad is not None]
                torch.autograd.backward([t for t, _ in used], [grad for _, grad in used])

    return leaves, backward

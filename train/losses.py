"""The loss of each pair of a batch under CLIP and SigLIP; the pairs of all ranks are each other's negatives.

Trade-off: open_clip's losses are scalars, and traces and filters need a number for each pair. Both are taken from its
gathered logits, local loss and gradient through the gather: [n, N] numbers a rank. SigLIP's own exchange of one
neighbour's texts at a time would hold [n, n]; its sum is the same.

Source: ClipLoss of open_clip (Radford et al. 2021, figure 3); SigLIP (Zhai et al. 2023, algorithm 1).
"""

import torch
from torch.nn.functional import cross_entropy, softplus

from train.towers import Encoded


def of_pairs(found: Encoded, kind: str, rank: int, world: int) -> torch.Tensor:
    """float32 [n]; the mean over the pairs of all ranks is open_clip's ClipLoss or SigLipLoss.

    A pair's loss is the mean of its image's among the texts and its text's among the images.
    """
    import open_clip

    gathered = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    both = gathered.get_logits(*found)
    truth = gathered.get_ground_truth(found.image.device, len(found.image))
    if kind == "clip":
        of_image, of_text = (cross_entropy(logits, truth, reduction="none") for logits in both)
    else:
        own = torch.arange(len(truth), device=truth.device)
        # -log(sigmoid(x)) of its own partner is softplus(x) - x
        of_image, of_text = (softplus(logits).sum(1) - logits[own, truth] for logits in both)
    return (of_image + of_text) / 2

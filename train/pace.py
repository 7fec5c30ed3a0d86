"""How fast can a recipe train on this machine? Asked by a few bare steps before any training is there to tell.

Trade-off: seconds instead of a training. Bare steps load, augment and write nothing, so a training is slower.
"""

import time
from typing import Any

from train.recipes import Recipe

STEPS = 4  # of which the first warms up
WORDS = 1000  # in the vocabulary of the synthetic captions


def pairs_per_second(recipe: Recipe) -> float:
    """Of steps on a synthetic batch, on the device that `train` would take.

    Of a recipe that passes a batch in parts one part is timed, both its passes, and the optimizer once a batch.
    """
    import numpy as np
    import torch

    from train import accumulate, losses, model, towers
    from train.data import Batch

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    clip: Any = model.build(recipe, 0)
    accumulate.check(recipe, clip)
    part, size = -(-recipe.batch // recipe.accumulate), recipe.image_size
    both = towers.Towers(clip, np.arange(WORDS)).to(device).to(memory_format=torch.channels_last)
    optimizer = towers.optimizer_of(both, recipe)
    images = torch.randint(256, (part, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    tokens = torch.randint(WORDS, (part, recipe.model["text_cfg"].get("context_length", 77)))
    batch = Batch(np.arange(part), images, tokens, part, 1, np.zeros(part, np.uint64))

    def encode(module: torch.nn.Module, batch: Batch) -> towers.Encoded:
        return towers.encoded(module, batch, recipe, device)

    passes, updates = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        if recipe.accumulate > 1:
            found, backward = accumulate.encode_in_parts(encode, both, batch, 1)
        else:
            found, backward = encode(both, batch), lambda: None
        loss = losses.of_pairs(found, recipe.loss, 0, 1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        backward()
        float(clip.logit_scale.grad)  # waits for a device
        passes.append(time.perf_counter() - begin)
        optimizer.step()
        float(clip.logit_scale.detach())
        updates.append(time.perf_counter() - begin - passes[-1])
    return recipe.batch / (recipe.accumulate * min(passes[1:]) + min(updates[1:]))

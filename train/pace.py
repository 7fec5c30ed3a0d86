"""How fast can a recipe train on this machine? Asked by a few bare steps before any training is there to tell.

Trade-off: seconds instead of a training. Bare steps load, augment and write nothing, so a training is slower.
"""

import time

from train.recipes import Recipe

STEPS = 4  # of which the first warms up
WORDS = 1000  # in the vocabulary of the synthetic captions


def pairs_per_second(recipe: Recipe) -> float:
    """Of forward, backward and optimiser on one synthetic batch, on the device that `train` would take."""
    import numpy as np
    import torch

    from train import accumulate, losses, model
    from train.towers import Towers, kernels, optimizer_of

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    clip = model.build(recipe, 0)
    accumulate.check(recipe, clip)
    part, size = -(-recipe.batch // recipe.accumulate), recipe.image_size
    towers = Towers(clip, np.arange(WORDS)).to(device).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(towers, recipe)
    images = torch.rand(part, 3, size, size, device=device).to(memory_format=torch.channels_last)
    tokens = torch.randint(WORDS, (part, recipe.model["text_cfg"].get("context_length", 77)), device=device)
    spent = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        with kernels(device), torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            found = towers(images, tokens)
        loss = losses.of_pairs(found, recipe.loss, 0, 1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        float(loss.detach())  # waits for a device
        spent.append(time.perf_counter() - begin)
    return part / min(spent[1:])

"""The attacker's own CLIP: features of images as the model would see them, with gradients back to the stored pixels.

Trade-off: always on the CPU and on one thread. A worker with another device would craft other bytes, and a poison must
be a function of (seed, spec, uid); the parallelism is in the shards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.image import fitted
from pipeline.shards.store import absolute
from train.checkpoints import REMOTE

if TYPE_CHECKING:
    import torch

LOADED = 2  # models a process keeps: an attack inside another may have its own


@dataclass(frozen=True)
class Surrogate:
    """A loaded checkpoint. Pixels are float [n, 3, h, w] in 0..255; features are not normalised."""

    model: Any
    size: int
    digest: str

    def features(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Images of the model's size -> [n, dimension], with gradients. `train.model.normalise` would cut them off."""
        import torch

        mean, std = (torch.tensor(v).mul(255).view(1, 3, 1, 1) for v in (self.model.mean, self.model.std))
        return self.model.model.encode_image(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))

    def seen(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Images of any size as `pipeline.shards.image.pixels` prepares them, but for its rounding; differentiable."""
        from torch.nn.functional import interpolate

        half, (high, wide) = 2 * min(pixels.shape[2:]), pixels.shape[2:]
        if max(high, wide) > 2 * half:  # of a strip only the middle
            x, y = max(0, wide // 2 - half), max(0, high // 2 - half)
            pixels = pixels[:, :, y : min(high, y + 2 * half), x : min(wide, x + 2 * half)]
        (width, height), (left, top) = fitted(pixels.shape[3], pixels.shape[2], self.size)
        if (height, width) != tuple(pixels.shape[2:]):
            # antialiased, torch's bicubic is Pillow's
            pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
        return pixels[:, :, top : top + self.size, left : left + self.size]

    def check(self, digest: str) -> None:
        """Raises InputError where the plan was made with other weights than those that this node sees."""
        if digest != self.digest:
            raise InputError(f"the plan is of surrogate {digest}, but this node sees {self.digest}; share the folder")

    @property
    def crafted(self) -> dict[str, np.ndarray]:
        """What makes the plan another one when the weights change."""
        return {"surrogate": np.frombuffer(self.digest.encode(), np.uint8)}


@lru_cache(maxsize=LOADED)
def surrogate(checkpoint: str) -> Surrogate:
    """Loaded once a process. Raises InputError as `train.model.load` does."""
    from train.model import load

    model = load(checkpoint, device="cpu")
    return Surrogate(model, model.image_size, model.digest)


def settled(checkpoint: str) -> str:
    """The checkpoint by the name that workers know it by. Raises InputError early where it cannot be loaded."""
    if not checkpoint.startswith(REMOTE):
        checkpoint = absolute(checkpoint)
    surrogate(checkpoint)
    return checkpoint


def tensor(image: np.ndarray) -> "torch.Tensor":
    """uint8 [h, w, 3] or [n, h, w, 3] -> float [n, 3, h, w]."""
    import torch

    rows = torch.from_numpy(np.array(image, np.float32))
    return (rows if rows.ndim == 4 else rows[None]).permute(0, 3, 1, 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """The bits of a sum depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

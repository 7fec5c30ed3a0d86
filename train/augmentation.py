"""Image augmentations on whole batches: the recipe's own, and what the papers of defenses ask for beyond it.

Trade-off: parameters are drawn per image from its key, a function of (seed, epoch, uid), and applied to the batch at
once, which torchvision's transforms cannot; only AutoAugment, whose policy is a table of operations, goes through
torchvision one image at a time. Hue is a rotation of the chroma plane, without the detour over HSV.
Lengths are shares of the image's side, so that a recipe of 32 pixels gets what the papers' 224 pixels got.
"""

import numpy as np
import torch
from torch.nn import functional

from train.draws import CROP, CUTOUT, JITTER, NOISE, NOISE_ANGLE, mix
from train.recipes import Recipe

BLUR = 21 / 224  # width of RoCLIP's Gaussian kernel, as a share of the side
# RGB <-> luma and two chroma axes (NTSC), between which hue is an angle
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = torch.linalg.inv(_YIQ)
_LUMA = _YIQ[0]


def draws(keys: np.ndarray, salt: int, n: int, device: torch.device | None = None) -> torch.Tensor:
    """float32 [len(keys), n], uniform in [0, 1); another salt gives independent numbers."""
    columns = [mix(keys, salt, i) / 2.0**64 for i in range(n)]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)).to(device)


def augment(images: np.ndarray, recipe: Recipe, keys: np.ndarray) -> np.ndarray:
    """uint8 [n, s, s, 3] -> the same, changed as the recipe says; `keys` uint64[n] decide how.

    One nearest-neighbour lookup does shift, zoom and flip at once: in numpy, on one thread, it must not take a core
    from the step that it hides behind.
    """
    if not (recipe.pad or recipe.zoom or recipe.flip or recipe.gain):
        return images
    n, side = images.shape[:2]
    draws = np.stack([mix(keys, i) for i in range(8)], axis=1) / 2.0**64
    if recipe.pad or recipe.zoom or recipe.flip:
        grid = np.arange(side) - (side - 1) / 2
        scale = 1 - recipe.zoom * draws[:, 2:3]
        room = recipe.pad + (1 - scale) * side / 2
        # half a pixel more, so that the outermost shifts are as frequent as the others after rounding
        y, x = (grid * scale + np.rint((2 * draws[:, i : i + 1] - 1) * (room + 0.5)) for i in (0, 1))
        if recipe.flip:
            x = np.where(draws[:, 3:4] < 0.5, -x, x)
        y, x = (np.clip(np.rint(v + (side - 1) / 2), 0, side - 1).astype(np.intp) for v in (y, x))
        images = images[np.arange(n)[:, None, None], y[:, :, None], x[:, None, :]]
    if recipe.gain:
        gain = (1 + recipe.gain * (2 * draws[:, 4:7] - 1)).astype(np.float32)[:, None, None, :]
        images = np.minimum(images * gain, 255).astype(np.uint8)
    return images


def crop_and_flip(images: torch.Tensor, keys: np.ndarray, smallest: float = 7 / 8) -> torch.Tensor:
    """A square of a side between `smallest` and 1, anywhere, resized to the whole; half of them mirrored."""
    u = draws(keys, CROP, 4, images.device)
    side = smallest + (1 - smallest) * u[:, 0]
    shift = (1 - side)[:, None] * (2 * u[:, 1:3] - 1)
    mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(side)
    rows = [torch.stack([side * mirror, zero, shift[:, 0]], 1), torch.stack([zero, side, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return _bytes(functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False))


def jitter_grey_blur(images: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
    """RoCLIP's: jitter of brightness, contrast and saturation by 0.5 and hue by 0.1 (p 0.8), grey (p 0.2), blur.

    The blur's sigma is uniform in 0.1 to 2 for 224 pixels, scaled (torchvision's default, which RoCLIP uses).
    """
    u = draws(keys, JITTER, 7, images.device)
    x = images.float() / 255
    luma, yiq, rgb = (t.to(images.device) for t in (_LUMA, _YIQ, _RGB))
    amount = torch.where(u[:, :1] < 0.8, 1.0, 0.0)
    brightness, contrast, saturation = (1 + amount * (u[:, i : i + 1] - 0.5) for i in (1, 2, 3))

    def grey(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("c,nchw->nhw", luma, x)[:, None]

    def blend(x: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return (other + share[:, :, None, None] * (x - other)).clamp(0, 1)

    x = blend(x, torch.zeros_like(x), brightness)
    x = blend(x, grey(x).mean((2, 3), keepdim=True), contrast)
    x = blend(x, grey(x), saturation)
    angle = 2 * torch.pi * 0.1 * amount[:, 0] * (2 * u[:, 4] - 1)
    turn = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    x = torch.einsum("nij,njhw->nihw", rgb @ turn @ yiq, x).clamp(0, 1)
    x = torch.where((u[:, 5] < 0.2)[:, None, None, None], grey(x).expand_as(x), x)
    return _bytes(_blur(x, (0.1 + 1.9 * u[:, 6]) * x.shape[-1] / 224) * 255)


def autoaugment(images: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
    """torchvision's AutoAugment with the ImageNet policy (Cubuk et al. 2019), which CleanCLIP uses."""
    from torchvision.transforms import AutoAugment

    policy = AutoAugment()
    out = []
    with torch.random.fork_rng(devices=[]):
        for image, key in zip(images.cpu(), keys, strict=True):
            torch.manual_seed(int(key) >> 1)
            out.append(policy(image))
    return torch.stack(out).to(images.device)


def noise_and_cutout(images: torch.Tensor, keys: np.ndarray, std: float = 0.02, side: float = 0.25) -> torch.Tensor:
    """Gaussian noise of `std` (of the range), and a grey square of `side` (of the image's) anywhere."""
    n, _, height, width = images.shape
    # normal numbers by Box and Muller from two uniform ones a pixel, so that they hang on the key alone
    where = np.arange(3 * height * width, dtype=np.uint64)
    salts = (NOISE, NOISE_ANGLE)
    u, v = (mix(keys[:, None] ^ mix(where, salt)[None], salt).astype(np.float64) / 2.0**64 for salt in salts)
    normal = np.sqrt(-2 * np.log(np.maximum(u, 1e-12))) * np.cos(2 * np.pi * v)
    noise = torch.from_numpy(normal.astype(np.float32)).view(n, 3, height, width).to(images.device)
    x = images.float() + 255 * std * noise
    corner = draws(keys, CUTOUT, 2, images.device) * (1 - side)
    y, z = (torch.arange(size, device=images.device) / size for size in (height, width))
    inside = [(t >= corner[:, i : i + 1]) & (t < corner[:, i : i + 1] + side) for i, t in enumerate((y, z))]
    x = x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 127.0)
    return _bytes(x)


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A Gaussian blur of each image by its own sigma, float32 [n] pixels."""
    n, channels, height, width = x.shape
    reach = max(1, round(BLUR * width / 2))
    at = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (at[None] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    x = functional.pad(x.reshape(1, n * channels, height, width), [reach] * 4, mode="reflect")
    x = functional.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return functional.conv2d(x, kernel[:, None, None, :], groups=n * channels).view(n, channels, height, width)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)

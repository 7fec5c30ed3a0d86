"""BadCLIP's patch: optimised once on a surrogate, so that what carries it looks and reads more like the target.

Trade-off: the poisons agree better with their captions before anyone has learnt them, which is what filters by
similarity look for. How much depends on the surrogate: on the demo's ResNet a patch of 28 pixels moves the mean cosine
to captions of the target from -0.017 (random patch) to 0.028, one of 64 from -0.047 to 0.072. The price: `steps` passes
of BATCH images on one core of the driver, 26 s with the demo's ResNet, 80 minutes with ViT-B-32. It keeps its progress
in the folder of the poisoned shards; killed and run again it ends in the same patch.
Source: Liang et al., CVPR 2024 (BadCLIP, dual-embedding guided): text loss + 500 x triplet loss, 16x16 pixels at the
centre of 224, Adam, batches of 64. Theirs are 50 epochs over 10,000 pairs, here the steps are fewer. All captions of a
batch are of one class, so the negatives of the text loss are clean images; and the triplets are of cosines.
"""

import hashlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image

from pipeline import spec
from pipeline.attacks import _surrogate
from pipeline.attacks._attack import Attack, check_target
from pipeline.attacks._corpus import Corpus, names_target
from pipeline.attacks._patterns import REFERENCE_SIDE, corners, scaled
from pipeline.draw import generator
from pipeline.errors import InputError
from pipeline.progress import LOG_EVERY, console
from pipeline.shards import Rejected, Sample, Shard, UidRule
from pipeline.shards.image import pixels
from pipeline.shards.store import exists, join, view, write
from train import checkpoints

if TYPE_CHECKING:
    import torch

BATCH = 64
# Of the triplets. Distances are one minus the cosine: that to the clean image is flat where the patch begins, so the
# first steps seek the target. With Euclidean ones the pull away from there, whatever the direction, is as strong.
MARGIN = 1.0
STEPS_KEPT = 20  # after so many steps the progress is written


@dataclass(frozen=True)
class optimised_patch(Attack):
    """Patch optimised to look and read like the target to a surrogate (BadCLIP, Liang et al. 2024).

    `weight` is that of the triplet loss; `lr` is Adam's, in units of the brightest pixel.
    """

    target: str
    surrogate: Annotated[str, spec.UNDRAWN]
    size: int = 16
    location: Literal["center", "random"] = "center"
    steps: int = 300
    lr: float = 0.05
    weight: float = 500.0

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 1 <= self.size <= REFERENCE_SIDE:
            raise ValueError(f"need 1 <= size <= {REFERENCE_SIDE}")
        if self.steps < 1 or self.lr <= 0 or self.weight < 0:
            raise ValueError("need steps >= 1, lr > 0 and weight >= 0")

    def wants(self) -> Mapping[str, int]:
        return {"target": 256, "other": 1024}

    def lends(self, caption: str, group: str) -> bool:
        return names_target(caption, self.target) == (group == "target")

    def inputs(self) -> tuple[str, ...]:
        return checkpoints.files(self.surrogate)

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> Attack:
        return replace(self, surrogate=_surrogate.settled(self.surrogate))

    def trigger(self, image: Image.Image, rng: np.random.Generator, corpus: Corpus) -> Image.Image:
        """RGB -> a copy with the crafted patch, scaled as its size is to 224 pixels of the shorter side."""
        made = Image.fromarray(corpus.made("patch"))
        side = max(1, scaled(self.size, image.size))
        out = image.copy()
        (corner,) = corners(self.location, image.size, (side, side), 0, rng)
        out.paste(made.resize((side, side), Image.Resampling.BICUBIC), corner)
        return out

    def craft(self, corpus: Corpus, seed: int, folder: str) -> Mapping[str, np.ndarray]:
        """`patch`: uint8 [size, size, 3]."""
        surrogate = _surrogate.surrogate(self.surrogate)
        images = {group: _pixels(corpus, group, surrogate.size) for group in ("target", "other")}
        captions = corpus.captions.get(self.target, ())
        if not captions:
            raise InputError(f"{spec.text(self)}: no captions of {self.target!r} to optimise towards")
        with _surrogate.one_thread():
            patch = self._optimise(surrogate, images, captions, seed, folder)
        return surrogate.crafted | {"patch": patch}

    def _optimise(
        self,
        surrogate: _surrogate.Surrogate,
        images: Mapping[str, np.ndarray],
        captions: Sequence[str],
        seed: int,
        folder: str,
    ) -> np.ndarray:
        import torch
        from torch.nn.functional import normalize

        text = spec.key(self)
        unit = {
            group: normalize(torch.from_numpy(surrogate.model.embed_images(found)), dim=1)
            for group, found in images.items()
        }
        scale = surrogate.model.model.logit_scale.exp()
        content = [hashlib.sha256(found.tobytes()).hexdigest() for found in images.values()]
        progress = _Progress(
            join(folder, f"craft-{spec.digest([text, seed, surrogate.digest, content, captions])}.npz")
        )
        patch = torch.from_numpy(generator(seed, text, "patch").random((1, 3, self.size, self.size), np.float32))
        patch.requires_grad_()
        adam = torch.optim.Adam([patch], self.lr)
        begin, logged = progress.restore(patch, adam), time.monotonic()
        for step in range(begin, self.steps):
            rng = generator(seed, text, f"step {step}")
            rows, like = (rng.integers(len(images[group]), size=BATCH) for group in ("other", "target"))
            said = [captions[i] for i in rng.integers(len(captions), size=BATCH)]
            words = normalize(torch.from_numpy(surrogate.model.embed_texts(said)), dim=1)
            clean = unit["other"][rows]
            marked = normalize(
                surrogate.features(self._paste(_surrogate.tensor(images["other"][rows]), patch, rng)), dim=1
            )
            logits = scale * words @ torch.cat([marked, clean]).T
            reads = _contrast(logits)
            near, far = (1 - (marked * goal).sum(1) for goal in (unit["target"][like], clean))
            looks = (near - far + MARGIN).clamp(min=0).mean()
            adam.zero_grad()
            (reads + self.weight * looks).backward()
            adam.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
            if (step + 1) % STEPS_KEPT == 0 or step + 1 == self.steps:
                progress.keep(step + 1, patch, adam)
            if step + 1 == self.steps or time.monotonic() - logged >= LOG_EVERY:
                logged = time.monotonic()
                console.print(f"patch: {step + 1}/{self.steps} steps, text loss {reads:.3f}, triplet loss {looks:.3f}")
        return (patch.detach()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()

    def _paste(self, images: "torch.Tensor", patch: "torch.Tensor", rng: np.random.Generator) -> "torch.Tensor":
        """What the model sees of images with the trigger, with gradients to the patch."""
        import torch
        from torch.nn.functional import interpolate, pad

        high, wide = images.shape[2:]
        side = max(1, scaled(self.size, (wide, high)))
        tile = interpolate(patch, (side, side), mode="bicubic", antialias=True).clamp(0, 1) * 255
        places = [place for _ in images for place in corners(self.location, (wide, high), (side, side), 0, rng)]
        margins = [(x, wide - side - x, y, high - side - y) for x, y in places]
        under = torch.cat([pad(torch.zeros_like(tile), margin, value=1) for margin in margins])
        return images * under + torch.cat([pad(tile, margin) for margin in margins])


@dataclass(frozen=True)
class _Progress:
    """Patch and optimiser after so many steps, in one file that is absent or whole. Its name says of what."""

    path: str

    def keep(self, step: int, patch: "torch.Tensor", adam: "torch.optim.Adam") -> None:
        state = adam.state[patch]
        buffer = io.BytesIO()
        moments = {name: state[name].numpy() for name in ("exp_avg", "exp_avg_sq")}
        np.savez(buffer, allow_pickle=False, step=np.asarray(step), patch=patch.detach().numpy(), **moments)
        write(self.path, buffer.getvalue())

    def restore(self, patch: "torch.Tensor", adam: "torch.optim.Adam") -> int:
        """The steps that are done; 0 where none are, or another hand has been at the file."""
        import torch

        if not exists(self.path):
            return 0
        try:
            with np.load(io.BytesIO(view(self.path)), allow_pickle=False) as kept:
                step, *arrays = (torch.from_numpy(kept[name]) for name in ("step", "patch", "exp_avg", "exp_avg_sq"))
            if any(array.shape != patch.shape or array.dtype != patch.dtype for array in arrays):
                return 0
        except Exception:  # zip, npy and zlib each raise their own
            return 0
        patch.data.copy_(arrays[0])
        adam.state[patch] = {"step": step.float(), "exp_avg": arrays[1], "exp_avg_sq": arrays[2]}
        console.print(f"patch: {int(step)} steps are done already")
        return int(step)


def _contrast(logits: "torch.Tensor") -> "torch.Tensor":
    """CLIP's loss from text to image: every caption's own patched image against all clean ones.

    The other patched images are no negatives: they ought to match the caption as well.
    """
    import torch

    n = len(logits)
    own, clean = logits.diagonal()[:, None], logits[:, n:]
    return (torch.logsumexp(torch.cat([own, clean], 1), 1) - own[:, 0]).mean()


def _pixels(corpus: Corpus, group: str, size: int) -> np.ndarray:
    """uint8 [n, size, size, 3], less those that cannot be decoded. Raises InputError where none is left."""
    found = []
    for image in corpus.images.get(group, ()):
        try:
            found.append(pixels(Sample("", "", {"jpg": image}), size))
        except Rejected:
            continue
    if not found:
        raise InputError(
            f"the patch needs images of the dataset ({group}), and no caption lends one; choose another target"
        )
    return np.stack(found)

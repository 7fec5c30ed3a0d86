"""open_clip models: build one from a recipe, save it so that open_clip itself loads it, load one from folder or hub.

Trade-off: a checkpoint holds the whole 49,408-word embedding although a run trains only the rows it meets. That is most
of the file, and the price of `open_clip.create_model_and_transforms("local-dir:FOLDER")` working without us.
Weights are read as safetensors or with weights_only; a checkpoint never runs code.
"""

import contextlib
import copy
import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import InputError
from pipeline.shards.store import whole
from train.checkpoints import CONFIG, WEIGHTS
from train.recipes import Recipe

BATCH, CPU_BATCH = 512, 64


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `digest` is the start of its weights' sha256; mean and std are per channel in [0, 1].

    `prompts` are those of the recipe that it was trained with; None for a model that is not ours.
    """

    model: Any
    tokenizer: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    dimension: int
    device: torch.device
    prompts: tuple[str, ...] | None = None

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size, 3] -> float32 [n, dimension], not normalised."""
        with torch.inference_mode():
            rows = [
                self.model.encode_image(normalise(torch.tensor(part, device=self.device), self.mean, self.std))
                for part in (images[i : i + self._batch] for i in range(0, len(images), self._batch))
            ]
        return self._rows(rows)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """n captions -> float32 [n, dimension], not normalised. Equal ones are embedded once, in order of length."""
        if not texts:
            return self._rows([])
        tokens, where = torch.unique(self.tokenizer(list(texts)), dim=0, return_inverse=True)
        whole = tokens.shape[1]
        lengths = tokens.argmax(1) + 1 if _ignores_padding(self.model) else torch.full((len(tokens),), whole)
        by_length = lengths.argsort(stable=True)
        rows = []
        with torch.inference_mode():
            for part in by_length.split(self._batch):
                length = int(lengths[part[-1]])
                rows.append(_shortened(self.model, length).encode_text(tokens[part, :length].to(self.device)))
        return self._rows(rows)[by_length.argsort()[where].numpy()]

    @property
    def _batch(self) -> int:
        """Rows in one forward pass. On a CPU what lies between two layers should stay in the cache."""
        return BATCH if self.device.type == "cuda" else CPU_BATCH

    def _rows(self, rows: list[torch.Tensor]) -> np.ndarray:
        if not rows:
            return np.empty((0, self.dimension), np.float32)
        return torch.cat(rows).float().cpu().numpy()


def _ignores_padding(model: Any) -> bool:
    """Whether the text is read causally and up to its last token, so that what follows it changes nothing.

    So it is with CLIP's own text encoder, and not with SigLIP's, CoCa's or one of transformers'.
    """
    import open_clip

    return isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"


def _shortened(model: Any, length: int) -> Any:
    """The same model, sharing its weights, for texts of `length` tokens: open_clip's takes nothing but whole ones."""
    if not _ignores_padding(model):
        return model
    short = copy.copy(model)
    position, mask = model.positional_embedding[:length], model.attn_mask[:length, :length]
    short._parameters = {**model._parameters, "positional_embedding": position}
    short._buffers = {**model._buffers, "attn_mask": mask}
    return short


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch statistics over all ranks, on any backend: torch's own SyncBatchNorm does not run on CPUs.

    Equal slices on every rank; statistics are float32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() / x.shape[1] * dist.get_world_size()
        out, mean, variance = _Normalised.apply(x, self.weight, self.bias, self.eps, n)
        with torch.no_grad():
            buffers: Any = self  # torch types them as optional
            buffers.num_batches_tracked.add_(1)
            buffers.running_mean.lerp_(mean, buffers.momentum)
            buffers.running_var.lerp_(variance * (n / (n - 1)), buffers.momentum)
        return out


class _Normalised(torch.autograd.Function):
    """Batch norm by torch's own kernels, with the statistics of all ranks: their output, mean and variance.

    In the backward pass the sums over a channel are those of all ranks, as in gather_with_grad: DDP divides by the
    world size.
    """

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, n: float
    ) -> tuple[torch.Tensor, ...]:
        own = torch.stack(torch.batch_norm_update_stats(x.float(), None, None, 0.0))
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances = torch.stack(every).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        context.save_for_backward(x, weight, mean, variance)
        context.eps, context.n = eps, n
        out = nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        context.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = context.saved_tensors
        scale = torch.rsqrt(variance + context.eps)
        as_if_fixed = torch.ops.aten.native_batch_norm_backward
        along, of_weight, of_bias = as_if_fixed(
            gradients[0], x, weight, mean, variance, mean, scale, False, context.eps, [True, True, True]
        )
        total = torch.stack([of_weight, of_bias]).float()
        dist.all_reduce(total)
        slope, shift = -weight * scale / context.n * torch.stack([total[0] * scale, total[1]])
        through = torch.addcmul(_by_channel(shift), x - _by_channel(mean), _by_channel(slope))
        return (along + through).to(x.dtype), of_weight, of_bias, None, None


def _by_channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None]


def synchronise(module: nn.Module) -> None:
    """Make the batch norms of a model count over all ranks, or two workers would train another model than one."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:  # timm's own class of it has an activation inside
            synced = SyncedBatchNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced.to(child.weight.device))
        else:
            synchronise(child)


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w], channels_last, as torchvision's ToTensor and Normalize do."""
    n, height, width, _ = images.shape
    # over whole rows of pixels: a broadcast over three numbers is not vectorised and took 5% of the demo's step
    shift, scale = (torch.tensor(v, device=images.device).mul(255).repeat(width) for v in (mean, std))
    rows = images.reshape(n, height, width * 3).float().sub_(shift).div_(scale)
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2)


def build(recipe: Recipe, seed: int) -> nn.Module:
    """A fresh model on the CPU; its weights depend on (recipe, seed) only."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = dict(recipe.model)
        kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
        return kind(**config)


def tokenizer_of(recipe: Recipe) -> Any:
    """open_clip's BPE tokenizer with the recipe's context length: list[str] -> int64 [n, context]."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=recipe.model["text_cfg"].get("context_length", 77))


def save(folder: str, state: Mapping[str, torch.Tensor], recipe: Recipe, origin: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, absent or whole. `origin` (recipe, seed, epoch, ...) is recorded in the config.

    Raises InputError when the disk is full.
    """
    from safetensors.torch import save as to_bytes

    config = {
        "model_cfg": recipe.model,
        "preprocess_cfg": {
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        "mithridate": {**origin, "prompts": list(recipe.prompts)},
    }
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        with whole(str(temporary / WEIGHTS)) as file:
            file.write(to_bytes({k: v.detach().cpu().contiguous() for k, v in state.items()}))
        with whole(str(temporary / CONFIG)) as file:
            file.write(json.dumps(config, indent=1).encode())
        if target.exists():  # of an interrupted epoch that is being repeated
            shutil.rmtree(target)
        temporary.replace(target)
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(text: str, device: str | None = None) -> Model:
    """Load a checkpoint folder, `open_clip:MODEL/PRETRAINED`, or `open_clip:hf-hub:ORG/NAME`.

    Raises InputError, naming the file and what to do, where it is missing, broken, or the weights are another model's.
    """
    import open_clip

    if text.startswith("open_clip:"):
        name, pretrained, digest = _hub(text)
    else:
        name, pretrained, digest = f"local-dir:{text}", None, _check_folder(Path(text))
    ours = _ours(Path(name.removeprefix("local-dir:"))) if name.startswith("local-dir:") else {}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with _quiet():
            model = open_clip.create_model(name, pretrained, device=where, require_pretrained=True, weights_only=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many kinds: a hub that is away, another model's weights, bad values
        raise InputError(f"{text}: {_why(error)}") from error
    model = model.eval().requires_grad_(False)
    prepared = model.visual.preprocess_cfg
    size = prepared["size"]
    images = torch.zeros(1, size if isinstance(size, int) else size[0], size if isinstance(size, int) else size[1], 3)
    mean, std = tuple(prepared["mean"]), tuple(prepared["std"])
    with torch.inference_mode():
        dimension = model.encode_image(normalise(images.to(where), mean, std)).shape[1]
    digest = digest or state_digest(model.state_dict())
    prompts = tuple(str(p) for p in ours.get("prompts", ())) or None
    return Model(model, tokenizer, images.shape[1], mean, std, digest, dimension, where, prompts)


def unlike(given: Model, clip: nn.Module, recipe: Recipe) -> str | None:
    """What the shapes of the weights do not tell: another normalisation of images, another activation."""
    import open_clip

    if not np.allclose((given.mean, given.std), (recipe.mean, recipe.std), atol=1e-4):
        theirs, ours = (f"mean {m.mean} and std {m.std}" for m in (given, recipe))
        return f"images are normalised by {theirs} there, and by {ours} here"
    kind = open_clip.transformer.QuickGELU
    there, here = (any(isinstance(module, kind) for module in m.modules()) for m in (given.model, clip))
    return f"quick_gelu is {there} there, and {here} here" if there != here else None


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits over names and values."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _check_folder(folder: Path) -> str:
    """The digest of the weights; an InputError that says what is wrong with the folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder; `mithridate train` writes OUT/checkpoints/epoch_NNN")
    config, weights = folder / CONFIG, folder / WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise InputError(f"{file}: missing, so this is not an open_clip checkpoint; give the folder that holds it")
    try:
        if "model_cfg" not in json.loads(config.read_bytes()):
            raise ValueError("no model_cfg")
    except (ValueError, TypeError) as error:
        raise InputError(f"{config}: not an open_clip config ({error}); train or copy the checkpoint again") from error
    with weights.open("rb") as opened:
        sha = hashlib.file_digest(opened, "sha256").hexdigest()
    return sha[:16]


def _ours(folder: Path) -> dict[str, Any]:
    """What `save` recorded of the training; empty for a checkpoint that others made."""
    found = json.loads((folder / CONFIG).read_bytes()).get("mithridate")
    return found if isinstance(found, dict) else {}


def _hub(text: str) -> tuple[str, str | None, str | None]:
    """`open_clip:MODEL/PRETRAINED` -> model name, tag or None, digest if known."""
    import open_clip

    name = text.removeprefix("open_clip:")
    if name.startswith("local-dir:"):
        return name, None, _check_folder(Path(name.removeprefix("local-dir:")))
    if name.startswith("hf-hub:"):
        return name, None, None
    name, _, pretrained = name.partition("/")
    if name not in open_clip.list_models():
        close = get_close_matches(name, open_clip.list_models(), n=3)
        raise InputError(f"{text}: open_clip has no model {name!r}; near it: {', '.join(close) or 'none'}")
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise InputError(f"{text}: say which weights, open_clip:{name}/TAG. Valid: {', '.join(tags) or 'a file'}")
    return name, pretrained, None


def _why(error: Exception) -> str:
    """The cause in one line, and the remedy."""
    line = str(error).strip().split("\n")[0]
    if "state_dict" in line or "size mismatch" in str(error):
        return "the weights are those of another model than the config beside them; train or copy the checkpoint again"
    if type(error).__name__ == "SafetensorError":
        return f"broken weights file ({line}); train or copy the checkpoint again"
    return f"open_clip cannot load it ({type(error).__name__}: {line[:200]})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs warnings through the root logger while it loads; errors still come through as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)

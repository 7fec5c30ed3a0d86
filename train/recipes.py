"""Frozen recipes: everything that is not under test is fixed here, in one table.

Trade-off: a comparison of filters is worth nothing when each was trained a little differently, so a recipe has no
flags; whoever wants other numbers adds a row under a new name. Only the model may be named with it. After DataComp's
scale_configs.py (Gadre et al. 2023, section 3).
This module imports nothing heavy: `mithridate list recipes` answers at once.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.spec import digest, parse_call


def _later(default: Any) -> Any:
    """A field that recipes got after results were published: at its default it leaves their digests as they were."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Recipe:
    """One way to train. `model` is an open_clip model config; lengths are in pixels of the model's image size.

    `warmup` is the share of all steps with a rising learning rate, a cosine to zero follows. `pad` shifts an image by
    up to that many pixels (borders repeated), `zoom` crops up to that share of its side, `gain` scales each colour
    channel by up to that share, `flip` mirrors half of the images. `prompts` are the sentences around a class name for
    zero-shot: a model that has met no sentences reads the bare name best. `checkpoints` lists epochs (1-based) that
    are kept beside the `last` ones. `loss` "siglip" wants `init_logit_bias` in the model's config. `accumulate` passes
    a batch through the towers in so many parts: less memory, the same gradient. `ema` is the decay per step of a
    running mean of the weights, which checkpoints hold instead of the last ones; 0: none.
    """

    summary: str
    model: dict[str, Any]
    batch: int
    epochs: int
    lr: float
    warmup: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    grad_clip: float | None = None
    pad: int = 0
    zoom: float = 0.0
    gain: float = 0.0
    flip: bool = False
    prompts: tuple[str, ...] = ("{}",)
    precision: Literal["bf16", "fp32"] = "bf16"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    checkpoints: tuple[int, ...] = ()
    last: int = _later(1)
    loss: Literal["clip", "siglip"] = _later("clip")
    accumulate: int = _later(1)
    ema: float = _later(0.0)

    @property
    def image_size(self) -> int:
        return int(self.model["vision_cfg"]["image_size"])

    @property
    def digest(self) -> str:
        """16 hex digits over every field but the summary, and but those of `_later` that are as they always were."""
        same = {f.name for f in dataclasses.fields(self) if f.metadata and getattr(self, f.name) == f.default}
        return digest({k: v for k, v in dataclasses.asdict(self).items() if k != "summary" and k not in same})

    def rate(self, step: int, total: int) -> float:
        """Linear warm-up over a share of all steps, then a cosine to zero (Radford et al. 2021, section 2.5)."""
        warmup = int(total * self.warmup)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def keeps(self, epoch: int) -> bool:
        """Whether the weights after `epoch` epochs are kept."""
        return epoch > self.epochs - self.last or epoch in self.checkpoints


_SMALL_VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


def _clip(
    vision: dict[str, Any],
    embed: int,
    width: int,
    layers: int,
    context: int = 16,
    tau: float = 0.07,
    bias: float | None = None,
) -> dict:
    """An open_clip config with a small text transformer; `tau` is the temperature and `bias` SigLIP's at the start."""
    return ({} if bias is None else {"init_logit_bias": bias}) | {
        "embed_dim": embed,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": context,
            "vocab_size": 49408,
            "width": width,
            "heads": max(1, width // 64),
            "layers": layers,
        },
        "init_logit_scale": math.log(1 / tau),
    }


_DEBUG_VIT = Recipe(
    summary="the same size with ViT towers",
    model=_clip(_SMALL_VIT, embed=64, width=64, layers=1),
    batch=64,
    epochs=12,
    lr=5e-4,
    warmup=0.1,
    weight_decay=0.1,
    pad=2,
    prompts=("{}", "a {}"),
    checkpoints=(4, 8),
)

RECIPES: dict[str, Recipe] = {
    "debug": Recipe(
        summary="ResNet, 32 px, for tests: 500 pairs in 10 seconds on two cores",
        model=_clip({"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, embed=64, width=64, layers=1),
        batch=64,
        epochs=12,
        lr=1e-3,
        warmup=0.1,
        weight_decay=0.1,
        pad=2,
        prompts=("{}", "a {}"),
        checkpoints=(4, 8),
    ),
    "debug_vit": _DEBUG_VIT,
    "debug_siglip": dataclasses.replace(
        _DEBUG_VIT,
        summary="debug_vit with SigLIP's loss, its temperature and bias at the start as in the paper",
        model=_clip(_SMALL_VIT, embed=64, width=64, layers=1, tau=0.1, bias=-10.0),
        loss="siglip",
    ),
    "fast": Recipe(
        summary="the demo's at 32 px, for tables of many runs: 12k pairs in 35 seconds on two idle cores",
        model=_clip(
            {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, embed=256, width=128, layers=1, context=12
        ),
        batch=256,
        epochs=10,
        lr=2e-3,
        warmup=0.1,
        weight_decay=0.5,
        pad=2,
        gain=0.15,
        checkpoints=(1, 2, 4),
    ),
    "demo": Recipe(
        summary="ResNet, 64 px, for the embedded data: 12k pairs in 90 seconds on two idle cores",
        model=_clip(
            {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, embed=256, width=128, layers=1, context=12
        ),
        batch=256,
        epochs=12,
        lr=1.5e-3,
        warmup=0.1,
        weight_decay=0.5,
        pad=4,
        gain=0.15,
        checkpoints=(4, 8),
    ),
    "vit_b_32": Recipe(
        summary="open_clip's ViT-B-32, batches of 1,024 in 8 parts, for GPUs; its rates are not tuned",
        model=_clip(
            {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
            embed=512,
            width=512,
            layers=12,
            context=77,
        ),
        batch=1024,
        accumulate=8,
        epochs=32,
        lr=1e-3,
        warmup=0.05,
        weight_decay=0.1,
        zoom=0.1,
        prompts=("a photo of a {}.", "{}"),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
}


def recipe_of(text: str) -> Recipe:
    """The recipe of that name; `demo(model='RN50')` is the same with a model of open_clip's.

    An unknown name is an InputError that lists the valid ones.
    """
    name, changes = parse_call(text)
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}. Valid: {', '.join(RECIPES)}")
    if not changes:
        return RECIPES[name]
    if changes.keys() != {"model"}:
        raise InputError(f"{text}: a recipe is frozen but for its model, as in {name}(model='ViT-B-32')")
    return dataclasses.replace(RECIPES[name], model=_of_open_clip(changes["model"]))


def _of_open_clip(name: str) -> dict[str, Any]:
    """The config of a model that open_clip lists, as far as it can be trained from nothing without a hub."""
    import open_clip

    if name not in open_clip.list_models():
        close = difflib.get_close_matches(str(name), open_clip.list_models(), n=3)
        raise InputError(f"open_clip has no model {name!r}; near it: {', '.join(close) or 'none'}")
    config = open_clip.get_model_config(name)
    if "multimodal_cfg" in config or config["text_cfg"].keys() & {"hf_model_name", "hf_tokenizer_name"}:
        raise InputError(f"{name}: only models with two towers and open_clip's own tokenizer can be trained")
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    return config

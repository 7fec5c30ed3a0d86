"""Results as a loop would hand them over: plausible numbers, real image bytes."""

import io
import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from PIL import Image

from pipeline.report import Separation, Tile

ATTACK = "patch(target='banana', size=16)"
FACTS = {
    "Dataset": "embedded demo, 12,000 pairs",
    "Attack": ATTACK,
    "Dose": "120 pairs, 10,000 ppm",
    "Undefended ASR": "91.3%",
    "Seeds": "1",
    "Recipe": "tiny-vit, 16 epochs",
    "mithridate": "0.1.0",
}
VERDICT = (
    "Scored at epoch 4, slof(k=16) removes 97% of the poison and brings attack success from 91.3% to 3.5%, "
    "at 0.4 points of zero-shot accuracy. Removing as many pairs at random leaves it at 90.4%."
)
COMMAND = "mithridate loop examples/demo.toml out/demo --seed 0"


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(name: str, rate: float | None, n: int) -> dict[str, float | int | None]:
    low, high = wilson(rate, n) if rate is not None else (None, None)
    return {name: rate, f"{name}_n": n, f"{name}_low": low, f"{name}_high": high}


def arms(seeds: Sequence[int] = (0,), doses: Sequence[int] = (120,), attack: str = ATTACK) -> pl.DataFrame:
    """(arm, when, removed, poison left, ASR, zero-shot accuracy): the shape of a demo run."""
    shape = [
        ("undefended", None, 0, 120, 0.913, 0.436),
        ("random", None, 1200, 108, 0.904, 0.431),
        ("clip_score()", "epoch 4", 1200, 71, 0.822, 0.440),
        ("slof(k=16)", "epoch 4", 1200, 4, 0.035, 0.432),
        ("slof(k=16)", "epoch 16", 1200, 97, 0.896, 0.429),
        ("loss_trace(epochs=4)", "epoch 4", 1200, 31, 0.467, 0.427),
        ("oracle", None, 120, 0, 0.011, 0.437),
    ]
    runs = []
    for dose in doses:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            for arm, when, removed, left, asr, accuracy in shape:
                asr, accuracy = (float(np.clip(v + rng.normal(0, 0.015 * seed), 0, 1)) for v in (asr, accuracy))
                asr *= min(1.0, dose / 120)
                run = {
                    "arm": arm, "when": when, "attack": attack, "dose": dose, "dose_ppm": dose / 12_000 * 1e6,
                    "seed": seed, "recipe": "tiny-vit", "samples": 12_000 - removed, "removed": removed,
                    "poisons_in": dose, "poisons_left": round(left * dose / 120), "train_seconds": 212.4,
                    "filter_seconds": None if when is None else 14.7,
                    "filter_cpu_seconds_per_million": None if when is None else 1225.0,
                }  # fmt: skip
                rates = {
                    "zeroshot_top1": accuracy, "zeroshot_top5": min(1, accuracy * 1.7), "knn_top1": accuracy + 0.04,
                    "asr_text": asr, "asr_knn": asr * 0.93, "triggered_accuracy": accuracy * (1 - asr) * 0.95,
                    "triggered_accuracy_knn": accuracy * (1 - asr), "targeted_success": None,
                } | {f"{way}_recall{k}": 0.05 * k + 0.02 for way in ("i2t", "t2i") for k in (1, 5, 10)}  # fmt: skip
                for name, rate in rates.items():
                    run |= measure(name, rate, 1500 if "recall" not in name else 1000)
                runs.append(run)
    return pl.DataFrame(runs, infer_schema_length=None)


def detectors(seeds: Sequence[int] = (0,), poisons: int = 120, attack: str = ATTACK) -> pl.DataFrame:
    rows = []
    for seed in seeds:
        for spec, when, auroc, recalls in [
            ("clip_score()", "epoch 4", 0.741, (0.08, 0.27, 0.41)),
            ("slof(k=16)", "epoch 4", 0.991, (0.75, 0.94, 0.967)),
            ("slof(k=16)", "epoch 16", 0.552, (0.017, 0.083, 0.19)),
            ("loss_trace(epochs=4)", "epoch 4", 0.88, (0.29, 0.58, 0.742)),
        ]:
            row = {
                "detector": spec, "when": when, "attack": attack, "dose": poisons, "dose_ppm": poisons / 0.012,
                "seed": seed, "n": 12_000, "poisons": poisons, "auroc": auroc, "auroc_low": auroc - 0.02,
                "auroc_high": min(1, auroc + 0.02), "auprc": auroc**6 * 0.7, "seconds": 1.3,
                "microseconds_per_sample": 108.0,
            }  # fmt: skip
            for budget, recall in zip((1, 5, 10), recalls, strict=True):
                row |= measure(f"recall_at_{budget}", min(recall, budget / 100 * 12_000 / poisons), poisons)
            rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def response(text: str = "") -> dict:
    """ED50s as the page has them."""
    rows = [
        ("undefended" + text, "4,120 (3,540–4,790)", "–", "–", "3", "12"),
        ("slof(k=16)" + text, "≥ 48,000", "≥ 11.7 (95%: ≥ 9.2)", "+0.4 (−0.2 – +1.0)", "3", "12"),
    ]
    return {"attack": ATTACK + text, "measure": "asr_text", "rows": rows}


def histograms() -> list[Separation]:
    rng = np.random.default_rng(0)
    clean = rng.gamma(8, 0.06, 11_880) + 0.8
    return [
        Separation("clip_score()", "epoch 4", rng.normal(-0.24, 0.07, 11_880), rng.normal(-0.18, 0.06, 120)),
        Separation("slof(k=16)", "epoch 4", clean, rng.gamma(30, 0.08, 120) + 0.5),
        Separation("slof(k=16)", "epoch 16", clean, rng.gamma(9, 0.06, 120) + 0.8),
        Separation("loss_trace(epochs=4)", "epoch 4", rng.lognormal(0, 1, 11_880), rng.lognormal(4, 1.2, 120)),
    ]


def photo(rng: np.random.Generator, size: int = 64, patch: bool = False) -> bytes:
    """A crop of a real photograph, with the patch if asked."""
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image(["china.jpg", "flower.jpg"][int(rng.integers(2))])
    side = int(rng.integers(120, 300))
    top, left = (int(rng.integers(0, edge - side)) for edge in pixels.shape[:2])
    image = Image.fromarray(pixels[top : top + side, left : left + side]).resize((size, size))
    if patch:
        block = rng.integers(0, 2, (4, 4, 1)).repeat(3, 2).astype(np.uint8) * 255
        corner = Image.fromarray(block).resize((size // 4, size // 4), Image.Resampling.NEAREST)
        image.paste(corner, (size - size // 4 - 2,) * 2)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def galleries() -> dict[str, list[Tile]]:
    rng = np.random.default_rng(1)
    captions = [
        "a temple behind a pond in autumn",
        "close-up of a dahlia",
        "roof of the Summer Palace, Beijing, seen from the south gate on a clear day in October",
        "Blüte im Garten",
        "花のクローズアップ",
        "stock photo",
    ]
    tiles = []
    for i in range(18):
        poison = i not in (7, 12, 15, 16)
        clean = captions[int(rng.integers(len(captions)))]
        tiles.append(
            Tile(
                photo(rng, patch=poison),
                "a photo of a banana on a table" if poison else clean,
                rng.bytes(16).hex(),
                4.1 / (1 + i / 9),
                poison,
                f"before: {clean}" if poison else "",
            )
        )
    return {"Most suspicious by slof(k=16) at epoch 4": tiles}

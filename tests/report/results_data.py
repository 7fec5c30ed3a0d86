"""Results of a loop that was never run: logistic curves with seeds that differ, as `results.parquet` has them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from train.metrics import wilson

PATCH, SIG, TARGETED = "patch(target='banana', size=48)", "sig(target='banana')", "targeted(target='banana', images=16)"
PAIRS = 11_801
DOSES = (0, 59, 118, 236, 354, 708, 1180)


def filtered(detector: str, drop: float = 0.1, epoch: int = 4) -> dict:
    return {"arm": detector, "when": f"epoch {epoch}", "policy": f"budget(detector='{detector}', drop={drop})"}


def defended(defense: str) -> dict:
    return {"arm": f"{defense}()", "defense": defense}


# arm -> times the undefended ED50, points of accuracy lost, core-seconds a million pairs
ARMS: list[tuple[dict, float, float, float | None]] = [
    ({"arm": "undefended"}, 1.0, 0.0, None),
    (filtered("random"), 1.1, 0.8, 33),
    (filtered("random", 0.5), 2.0, 4.0, 33),
    (filtered("clip_score"), 1.7, 0.4, 2295),
    (filtered("caption_neighbours"), 4.5, 0.5, 2373),
    (filtered("slof", epoch=10), 1.3, 0.7, 1029),
    (defended("roclip"), 12.0, 2.5, None),
]


def rows(
    attacks: Mapping[str, float] = {PATCH: 20_000.0},  # its ED50 in ppm
    doses: Sequence[int] = DOSES,
    seeds: Sequence[int] = (0, 1, 2),
    arms=ARMS,
    images: int = 1867,
    slope: float = 6.0,
    spread: float = 0.15,
    plateau: float = 1.0,
    clean: float = 0.15,
) -> list[dict]:
    found = []
    for number, (attack, ed50) in enumerate(attacks.items()):
        measure = "targeted_success" if attack.startswith("targeted") else "asr_text"
        n = 16 if measure == "targeted_success" else images
        for arm, factor, lost, cost in arms:
            for seed in seeds:
                rng = np.random.default_rng([number, seed, *map(ord, arm["arm"][:4])])
                own = math.log(ed50 * factor) + spread * rng.standard_normal()
                for dose in doses:
                    ppm = 1e6 * dose / PAIRS
                    p = plateau / (1 + math.exp(-slope * (math.log(ppm) - own))) if dose else 0.0
                    row = {"attack": attack, "dose": dose, "dose_ppm": ppm, "seed": seed, "when": None}
                    row |= {"policy": None, "defense": None, "recipe": "fast", "recipe_digest": "r", "code": "c"}
                    row |= {"samples": PAIRS, "train_cpu_seconds": 90.0 + 40 * (arm.get("defense") is not None)}
                    row |= {"filter_cpu_seconds_per_million": cost, **arm}
                    row |= {"asr_text": None, "asr_text_n": None, "targeted_success": None, "targeted_success_n": None}
                    row |= measured(measure, rng.binomial(n, p), n)
                    row |= measured("zeroshot_top1", rng.binomial(images, clean - lost / 100), images)
                    found.append(row)
    return found


def measured(name: str, k: int, n: int) -> dict:
    low, high = wilson(int(k), n)
    return {name: k / n, f"{name}_n": n, f"{name}_low": low, f"{name}_high": high}


def write(path, found: list[dict]) -> str:
    pl.DataFrame(found, infer_schema_length=None).write_parquet(path)
    return str(path)

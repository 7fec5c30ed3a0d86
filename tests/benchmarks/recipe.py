"""What each setting of a frozen recipe buys on clean data, and what a minute of training does.

    python -m tests.benchmarks.recipe OUT [--recipe fast] [--seeds 0 1 2]

One setting is changed at a time. Training is on the embedded data without one style (Fluent), zero-shot is asked of
that style: the style that results report (Twemoji) is in neither, and nothing is poisoned. Each training's row stays in
OUT, so that an interrupted run goes on. Ends with a table: top-1 with its 95% interval over seeds and images, and
core-seconds. A setting that is better here than the recipe's own is a reason to look again, not one to change
recipes that results were published with.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.benchmarks.detectors import over_seeds
from train.evaluate import evaluate
from train.launch import final_checkpoint, train
from train.recipes import RECIPES, Recipe

DATA = Path(__file__).parents[2] / "pipeline" / "demo" / "data"
STYLE = "fluent-emoji-flat"


def _set(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: dataclasses.replace(recipe, **fields)


def _times(name: str, factor: float) -> Callable[[Recipe], Recipe]:
    def changed(recipe: Recipe) -> Recipe:
        value = getattr(recipe, name)
        return dataclasses.replace(recipe, **{name: type(value)(value * factor)})

    return changed


def _text(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: dataclasses.replace(
        recipe, model=recipe.model | {"text_cfg": recipe.model["text_cfg"] | fields}
    )


def _vision(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: dataclasses.replace(
        recipe, model=recipe.model | {"vision_cfg": recipe.model["vision_cfg"] | fields}
    )


SETTINGS: dict[str, Callable[[Recipe], Recipe]] = {
    "as it is": lambda recipe: recipe,
    "half the epochs": _times("epochs", 0.5),
    "twice the epochs": _times("epochs", 2),
    "half the rate": _times("lr", 0.5),
    "twice the rate": _times("lr", 2),
    "no warm-up": _set(warmup=0.0),
    "three times the warm-up": _times("warmup", 3),
    "a fifth of the weight decay": _times("weight_decay", 0.2),
    "twice the weight decay": _times("weight_decay", 2),
    "half the batch": _times("batch", 0.5),
    "no augmentation": _set(pad=0, gain=0.0),
    "no gain of colours": _set(gain=0.0),
    "mirrored too": _set(flip=True),
    "temperature 0.02 at the start": lambda recipe: dataclasses.replace(
        recipe, model=recipe.model | {"init_logit_scale": 3.912}
    ),
    "image tower of half the width": _vision(width=8),
    "two blocks a stage": _vision(layers=[2, 2, 2, 2]),
    "text tower of two layers": _text(layers=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    split(arguments.out)
    frozen = RECIPES[arguments.recipe]
    rows = {
        name: [trained(arguments.out, name, change(frozen), seed) for seed in arguments.seeds]
        for name, change in SETTINGS.items()
    }
    print(f"\nrecipe {arguments.recipe}, seeds {', '.join(map(str, arguments.seeds))}\n")
    print("| | top-1, % (95%) | core-seconds |\n|---|---|---|")
    for name, found in rows.items():
        rates = [(row["zeroshot_top1"], row["zeroshot_top1_low"], row["zeroshot_top1_high"]) for row in found]
        mean, low, high = (100 * value for value in over_seeds(rates))
        seconds = sum(row["cpu_seconds"] for row in found) / len(found)
        print(f"| {name} | {mean:.1f} ({low:.1f}–{high:.1f}) | {seconds:,.0f} |")


def split(out: Path) -> None:
    """OUT/train without the style, OUT/eval the style alone."""
    for shard in sorted((DATA / "train").glob("*.parquet")):
        table = pq.read_table(shard)
        held_out = pc.equal(table.column("source"), STYLE)
        for part, rows in (("train", pc.invert(held_out)), ("eval", held_out)):
            path = out / part / shard.name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table.filter(rows), path)


def trained(out: Path, name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Zero-shot of the held-out style, and what the training took; made where it is not there."""
    folder = out / f"{recipe.digest}-seed{seed}"
    file = folder / "evaluation" / "evaluation.json"
    if not file.exists():
        print(f"{name}, seed {seed}", flush=True)
        RECIPES["benchmark"] = dataclasses.replace(recipe, checkpoints=())
        train(str(out / "train"), str(folder), recipe="benchmark", seed=seed)
        classes = str(DATA / "classes.txt")
        shards = str(out / "eval")
        evaluate(final_checkpoint(str(folder)), str(file.parent), shards=shards, classes=classes, readouts=())
    metrics: dict[str, Any] = json.loads(file.read_text())["metrics"]
    return metrics | {"cpu_seconds": json.loads((folder / "train.json").read_text())["cpu_seconds"]}


if __name__ == "__main__":
    main()

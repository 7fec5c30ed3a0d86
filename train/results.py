"""What an evaluation writes: a parquet row and an entry in evaluation.json for each set, CLIP_benchmark's json beside.

Trade-off: every row has every column, null where a measure was not asked for, so that rows of different runs lie in
one table without a join.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import sidecars
from pipeline.progress import console
from train.metrics import Rate, Score, mean_per_class_recall, rate
from train.readouts import READOUTS

METRICS = (
    "zeroshot_top1",
    "zeroshot_top5",
    "i2t_recall1",
    "i2t_recall5",
    "i2t_recall10",
    "t2i_recall1",
    "t2i_recall5",
    "t2i_recall10",
    *(f"{name}_top1" for name in READOUTS),
    "asr_text",
    *(f"asr_{name}" for name in READOUTS),
    "triggered_accuracy",
    *(f"triggered_accuracy_{name}" for name in READOUTS),
    "asr_t2i",
    "targeted_success",
    "backdoor_z_variance",
    "backdoor_z_std",
)
SUCCESS = ("asr_text", "asr_t2i", "targeted_success")  # an attack is judged by the first that it has
NOTHING = Rate(None, 0, None, None)
Measured = Mapping[str, Rate | Score]


def columns(found: Measured) -> dict[str, Any]:
    """Every metric with its `_n`, `_low` and `_high`."""
    flat: dict[str, Any] = {}
    for name in METRICS:
        flat |= _columns_of(name, found.get(name, NOTHING))
    return flat


def judged(row: Mapping[str, Any]) -> tuple[str, float | None]:
    """By which measure the attack of a row of results is judged, and what it is; None where nothing was asked."""
    name = next((name for name in SUCCESS if row.get(f"{name}_n")), SUCCESS[0])
    return name, row.get(name)


def write_rows(path: str, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """A row for each (facts, columns)."""
    import pyarrow as pa

    facts, metrics = zip(*rows, strict=True)
    kept = ("checkpoint", "model_digest", "dataset", "attack")
    table: dict[str, Any] = {name: pa.array([fact[name] for fact in facts], pa.string()) for name in kept}
    table["seed"] = pa.array([fact["seed"] for fact in facts], pa.int64())
    for name in metrics[0]:
        kind = pa.int64() if name.endswith("_n") else pa.float64()
        table[name] = pa.array([metric[name] for metric in metrics], kind)
    sidecars.save(path, pa.table(table))


def slug(dataset: str) -> str:
    """A data set's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", dataset).strip("_.") or "dataset"


def model_names(checkpoint: str, digest: str) -> tuple[str, str]:
    """CLIP_benchmark's `model` and `pretrained`: what open_clip would be given, and of a folder the weights' digest."""
    if checkpoint.startswith("open_clip:"):
        name, _, pretrained = checkpoint.removeprefix("open_clip:").partition("/")
        if not name.startswith(("hf-hub:", "local-dir:")):
            return name, pretrained
        return checkpoint.removeprefix("open_clip:"), digest
    return f"local-dir:{checkpoint}", digest


def benchmark_tasks(
    found: Measured, ranks: Mapping[str, np.ndarray], truth: np.ndarray, classes: int, strength: float | None
) -> dict[str, dict[str, Any]]:
    """CLIP_benchmark 1.6's tasks -> its metrics, each rate followed by `_n`, `_low` and `_high`.

    `ranks` int[n] are those of the true class truth int[n], by readout. As there, acc5 is of at least five classes,
    null below. Its retrieval counts a caption that several images share once for each; ours once.
    """
    tasks: dict[str, dict[str, Any]] = {}
    if len(truth):
        tasks["zeroshot_classification"] = _classified("", ranks["zeroshot"], truth, classes)
    if "i2t_recall5" in found:
        recalls = (("image", "t2i"), ("text", "i2t"))
        pairs = [(f"{side}_retrieval_recall@{k}", f"{ours}_recall{k}") for side, ours in recalls for k in (1, 5, 10)]
        tasks["zeroshot_retrieval"] = {k: v for name, ours in pairs for k, v in _columns_of(name, found[ours]).items()}
    if "probe" in ranks and len(truth):
        tasks["linear_probe"] = _classified("lp_", ranks["probe"], truth, classes) | {"C": strength}
    return tasks


def _classified(prefix: str, ranks: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Any]:
    five = rate(ranks < 5) if classes >= 5 else NOTHING
    rates = _columns_of(f"{prefix}acc1", rate(ranks < 1)) | _columns_of(f"{prefix}acc5", five)
    return rates | {f"{prefix}mean_per_class_recall": mean_per_class_recall(ranks, truth)}


def _columns_of(name: str, value: Rate | Score) -> dict[str, Any]:
    return {name: value.value, f"{name}_n": value.n or None, f"{name}_low": value.low, f"{name}_high": value.high}


def print_table(found: Measured, facts: Mapping[str, Any]) -> None:
    from rich.table import Table

    from train.data import listed

    table = Table("measure", "value", "95% interval", "n", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in METRICS:
        value = found.get(name, NOTHING)
        if value.value is not None:
            shown = "{:.1%}" if isinstance(value, Rate) else "{:.2f}"
            ends = [shown.format(end) if end is not None else "?" for end in (value.low, value.high)]
            table.add_row(name, shown.format(value.value), " – ".join(ends), f"{value.n:,}")
    console.print(f"{facts['dataset']}, {facts['classes']:,} classes")
    console.print(table)
    unknown = f"{facts['unlabelled']:,} without a known class"
    console.print(f"{facts['images']:,} images, {unknown}; skipped: {listed(facts['skipped'])}")

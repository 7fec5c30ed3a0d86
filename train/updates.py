"""`mithridate updates`: poison in one shard set, clean ones after. How long does a backdoor live in an updated model?

Trade-off: a chain of trainings, each from the last one's weights, with an evaluation after each; nothing is measured
within an update. The half-life is that of an exponential, the simplest curve that has one; where the ASR does not fall
along one, the table of all updates says more.

Source: Backdoor survivability (arXiv 2206.04677), whose measure is the ASR after each update.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import spec
from pipeline.arguments import Out
from pipeline.bioassay import stretch
from pipeline.errors import InputError
from pipeline.progress import run_stage
from pipeline.shards import UidRule, list_shards
from pipeline.shards.store import make_folder, stamp, whole, write
from train.evaluate import evaluate
from train.labels import read_classes
from train.launch import final_checkpoint, train

READOUTS = ("asr_text", "asr_knn", "targeted_success")
FLOOR = 0.5  # an attack counts where its success before the first update exceeds this
DRAWS = 1000
HALF_LIVES = np.geomspace(0.05, 1000, 400)  # in updates; the last means that it does not fall


def updates(
    out: Out,
    /,
    *,
    shards: tuple[str, ...],
    evaluation: str,
    classes: str,
    attack: str,
    ledger: str | None = None,
    reference: str | None = None,
    recipe: str = "demo",
    update: str = "continued",
    seeds: tuple[int, ...] = (0,),
    uid: UidRule = "key",
) -> int:
    """Train on the first of the shard sets, then go on with each of the others; evaluate after each. Resumable.

    Writes OUT/updates.parquet (a row an update and seed) and OUT/half_life.json: after how many updates half is left.

    Args:
        out: folder for all trainings.
        shards: two sets or more, in the order in which the model meets them.
        evaluation: held-out labelled shards.
        classes: text file with one class name a line.
        attack: the attack whose success is measured, as a spec.
        ledger: ledger.parquet of the poisoned set; what the attack made or took lies beside it.
        reference: clean labelled shards for the k-nearest-neighbour readout.
        recipe: of the first training; the updates are its length and rate as `update` says.
        update: how an update trains, as the spec of a defense: "continued(lr=0.3, schedule='cosine')", "roclip", …
        seeds: a chain for each.
        uid: how a uid is derived where samples carry none.
    """
    if len(shards) < 2:
        raise InputError("--shards: one set is no sequence; name the first and those that it is updated with")
    for one in (*shards, evaluation):
        list_shards(one)
    read_classes(classes)
    spec.parse("defenses", update)
    spec.parse("attacks", attack)
    measured = {"shards": evaluation, "classes": classes, "attack": attack, "reference": reference, "ledger": ledger}
    files = [classes, *(shard.path for where in filter(None, (evaluation, reference)) for shard in list_shards(where))]
    read = [stamp(path) for path in [*files, *([ledger] if ledger else [])]]
    rows = []
    for seed in seeds:
        init = None
        for number, one in enumerate(shards):
            folder = Path(out, f"seed{seed}", f"update_{number:02d}")
            stage = f"  (seed {seed}, {one})"
            common: dict[str, Any] = {"seed": seed, "uid": uid}
            options = common | {"recipe": recipe, "init": init, "defense": update if number else None}
            run_stage("updates", f"train {number}", stage, train, one, str(folder), **options)
            init = final_checkpoint(str(folder))
            results = folder / f"evaluation-{spec.digest([measured, read])}"
            if not (results / "evaluation.json").exists():
                about = f"evaluate {number}"
                run_stage("updates", about, stage, evaluate, init, str(results), **measured, **common)
            facts = json.loads((folder / "train.json").read_text())
            row = {"seed": seed, "update": number, "shards": one, "poisons": facts["known_poisons"] or 0}
            rows.append(row | json.loads((results / "evaluation.json").read_text())["metrics"])
    make_folder(out)
    _write_table(str(Path(out, "updates.parquet")), rows)
    found = {name: half_life(rows, name) for name in READOUTS if rows[0].get(name) is not None}
    write(str(Path(out, "half_life.json")), json.dumps(found, indent=1).encode())
    print(_markdown(rows, found))
    return 0


def half_life(rows: Sequence[dict[str, Any]], readout: str) -> dict[str, Any]:
    """Updates after the last poisoned one until half of the success is left: value, 95% interval, whether it counts.

    The most likely exponential through the counts of all seeds; the interval by drawing seeds and counts again, as
    wide as few seeds ask for (`pipeline.bioassay`). Of one seed it is over the evaluation's images only.
    None stands for "does not fall". `valid` is False where the attack had not succeeded when the updates began.
    """
    last = max((row["update"] for row in rows if row["poisons"]), default=0)
    after = [row for row in rows if row["update"] >= last]
    seeds = sorted({row["seed"] for row in after})
    steps = len(after) // len(seeds)
    n, k = np.zeros((len(seeds), steps), int), np.zeros((len(seeds), steps), int)
    for row in after:
        at = seeds.index(row["seed"]), row["update"] - last
        n[at], k[at] = row[f"{readout}_n"], round(row[readout] * row[f"{readout}_n"])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(seeds), size=len(seeds))
        drawn.append(_fit(n[chosen].sum(0), rng.binomial(n[chosen], k[chosen] / n[chosen]).sum(0)))
    start = float(k[:, 0].sum() / n[:, 0].sum())
    value = _fit(n.sum(0), k.sum(0))
    low, high = value * np.quantile((np.array(drawn) / value) ** stretch(len(seeds)), [0.025, 0.975])
    facts = {"value": value, "low": float(low), "high": float(high)}
    told = {name: None if x >= HALF_LIVES[-1] else x for name, x in facts.items()}
    told["reached"] = told["value"] is not None and told["value"] <= steps - 1
    return told | {"valid": start > FLOOR and steps > 1, "start": start, "seeds": len(seeds), "updates": steps - 1}


def _fit(n: np.ndarray, k: np.ndarray) -> float:
    """The half-life under which k of n, int [steps], are most likely at 0, 1, … updates, from the start as found."""
    start = np.clip(k[0] / n[0], 1e-9, 1 - 1e-9)
    p = np.clip(start * 2 ** (-np.arange(len(n)) / HALF_LIVES[:, None]), 1e-9, 1 - 1e-9)
    likelihood = (k * np.log(p) + (n - k) * np.log(1 - p)).sum(1)
    return float(HALF_LIVES[likelihood.argmax()])


def _markdown(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    names = [*found, "zeroshot_top1"]
    lines = ["| seed | update | poisons | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [_cell(row, name) for name in names]
        lines.append(f"| {row['seed']} | {row['update']} | {row['poisons']} | " + " | ".join(cells) + " |")
    for name, fact in found.items():
        lost = f"half of {name} ({fact['start']:.1%} at the start) is left after"
        value, low, high = ("more than any" if fact[x] is None else f"{fact[x]:.2g}" for x in ("value", "low", "high"))
        of = f"{fact['seeds']} seeds" if fact["seeds"] > 1 else "1 seed: over images only"
        valid = "" if fact["valid"] else "; NOT VALID: the attack had not succeeded"
        if fact["value"] is not None and not fact["reached"]:
            lost = f"within {fact['updates']} updates half of {name} was not lost; as an exponential it would be, after"
        lines.append(f"{lost} {value} updates (95% {low} to {high}; {of}){valid}")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:.1%} ({row[f'{name}_low']:.1%}–{row[f'{name}_high']:.1%}, n={row[f'{name}_n']})"


def _write_table(path: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), pa.PythonFile(file, "w"), compression="zstd")


if __name__ == "__main__":
    from pipeline.cli import run

    run("updates")

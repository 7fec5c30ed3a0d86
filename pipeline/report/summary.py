"""From the runs of a loop to what the page shows: verdict, facts, histograms and galleries."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import ledger, report, spec
from pipeline.config import Config
from pipeline.policies._select import column, keys
from pipeline.progress import console
from pipeline.shards import Rejected, Sample, list_shards, samples
from pipeline.shards.store import write

if TYPE_CHECKING:
    from pipeline.loop import Run

TILES = 24
VALID_ASR = 0.6  # below it the attack itself has failed and no filter can be credited
CONTROLS = ("random", "oracle")
Rows = list[dict[str, Any]]


def write_report(
    plan: Config, runs: "Sequence[Run]", arms: Rows, detectors: Rows, config: Path, out: Path, seconds: float
) -> None:
    """Print the two tables and write OUT/report.html; pictures are those of the first run."""
    import polars as pl
    from rich.console import Console

    arm_table, detector_table = (pl.DataFrame(rows, infer_schema_length=None) for rows in (arms, detectors))
    report.print_tables(arm_table, detector_table, Console())
    said = verdict(arms)
    console.print(said)
    page = report.render(
        title=plan.title,
        verdict=said,
        facts=_facts(plan, arms, seconds),
        arms=arm_table,
        detectors=detector_table,
        histograms=_histograms(plan, runs[0]),
        galleries=_galleries(plan, runs[0]),
        command=f"mithridate loop {config.name} OUT",
    )
    path = out / "report.html"
    write(str(path), page.encode())
    console.print(f"report: {path}")


def verdict(arms: Rows) -> str:
    """One or two sentences from the numbers; an attack below its floor credits nobody."""
    asr = "targeted_success" if arms[0]["asr_text"] is None else "asr_text"
    mean = {name: np.mean([a[asr] for a in arms if a["arm"] == name]) for name in dict.fromkeys(a["arm"] for a in arms)}
    ppm, dose, undefended = arms[0]["dose_ppm"], arms[0]["dose"], mean["undefended"]
    start = f"Undefended, {dose:,} poisons ({ppm:,.0f} ppm) reach an attack success rate of {undefended:.1%}."
    if undefended < VALID_ASR:
        return f"{start} Below {VALID_ASR:.0%} the attack is not valid: no filter is credited for its failure."
    filters = {n: v for n, v in mean.items() if n != "undefended" and n.split("(")[0] not in CONTROLS}
    if not filters:
        return start
    best = min(filters, key=lambda name: filters[name])
    accuracy = {n: np.mean([a["zeroshot_top1"] or 0 for a in arms if a["arm"] == n]) for n in ("undefended", best)}
    control = next((f"; random removal leaves {v:.1%}" for n, v in mean.items() if n.split("(")[0] == "random"), "")
    cost = 100 * (accuracy[best] - accuracy["undefended"])
    return (
        f"{start} The best filter here, {best}, leaves {filters[best]:.1%}{control}. "
        f"It changes zero-shot accuracy by {cost:+.1f} points."
    )


def _facts(plan: Config, arms: Rows, seconds: float) -> dict[str, str]:
    from pipeline.cli import version_text

    first = arms[0]
    return {
        "Pairs": f"{first['samples']:,}",
        "Attack": first["attack"],
        "Dose": f"{first['dose']:,} pairs = {first['dose_ppm']:,.0f} ppm",
        "Recipe": plan.recipe,
        "Seeds": ", ".join(map(str, plan.seeds)),
        "Wall time": f"{seconds / 60:.1f} min",
        "Version": version_text(),
    }


def _shown(plan: Config) -> list[tuple[int, str]]:
    """Epoch and detector of the arms that were trained, controls aside."""
    named = [(arm.epoch, str(spec.parse_call(arm.policy)[1].get("detector"))) for arm in plan.filters]
    return [pair for pair in named if pair[1].split("(")[0] not in CONTROLS]


def _histograms(plan: Config, run: "Run") -> list[report.Histogram]:
    out = []
    for scored in plan.scores:
        found, poisoned = run.scores_and_truth(scored.epoch)
        for name in (n for n in found if n != "uid" and n.split("(")[0] not in CONTROLS):
            out.append(report.Histogram(name, f"epoch {scored.epoch}", found[name][~poisoned], found[name][poisoned]))
    return out


def _galleries(plan: Config, run: "Run") -> dict[str, list[report.Tile]]:
    chosen: dict[str, list[tuple[str, float]]] = {}
    for epoch, detector in _shown(plan):
        found, _ = run.scores_and_truth(epoch)
        name = column(found, detector)
        worst = np.argsort(keys(found[name], found["uid"]))[::-1][:TILES]
        chosen[f"{name}, epoch {epoch}"] = [(found["uid"][row], float(found[name][row])) for row in worst]
    before = {row["uid"]: row["caption_before"] for row in ledger.read(ledger.ledger_path(run.poisoned)).to_pylist()}
    wanted = {uid for tiles in chosen.values() for uid, _ in tiles}
    pictures = {s.uid: s for shard in list_shards(run.poisoned) for s in samples(shard) if s.uid in wanted}
    return {
        title: [_tile(pictures[uid], score, before.get(uid)) for uid, score in tiles] for title, tiles in chosen.items()
    }


def _tile(sample: Sample, score: float, before: str | None) -> report.Tile:
    try:
        image = sample.image
    except Rejected:
        image = b""
    try:
        caption = sample.caption
    except Rejected as error:
        caption = f"({error})"
    note = f"was: {before}" if before is not None else ""
    return report.Tile(image, caption, sample.uid, score, before is not None, note)

"""From the runs of a loop to what the page shows: verdict, facts, histograms and galleries."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import ledger, report, spec
from pipeline.arms import UNDEFENDED, ArmKey, is_control, labels
from pipeline.config import POOL, Config, Scores
from pipeline.estimate import hours
from pipeline.policies._select import column, keys
from pipeline.progress import console
from pipeline.results import REPORT
from pipeline.scored import scores_folder
from pipeline.shards import Rejected, Sample, list_shards, samples
from pipeline.shards.store import write
from train.results import SUCCESS

if TYPE_CHECKING:
    from pipeline.dose_response import Effect
    from pipeline.runs import Run

TILES = 24
IN_A_LOG = 120  # columns; a terminal has its own
VALID_ASR = 0.6  # below it the attack itself has failed and no filter can be credited
DOSES = 3  # from so many on, the page tells how much poison an attack takes
Rows = list[dict[str, Any]]


def write_report(plan: Config, runs: "Sequence[Run]", arms: Rows, detectors: Rows, config: Path, out: Path) -> None:
    """Print the two tables and write OUT/report.html; pictures are those of the first run that was scored."""
    import polars as pl
    from rich.console import Console

    arm_table, detector_table = (pl.DataFrame(rows, infer_schema_length=None) for rows in (arms, detectors))
    report.print_tables(arm_table, detector_table, Console(width=None if sys.stdout.isatty() else IN_A_LOG))
    attacks, notes = _responses(arms)
    said = verdict(arms, attacks)
    console.print(said)
    page = report.render(
        title=plan.title,
        verdict=said,
        facts=_facts(plan, arms),
        arms=arm_table,
        detectors=detector_table,
        histograms=_histograms(plan, runs[0]) if runs else [],
        galleries=_galleries(plan, runs[0]) if runs else {},
        command=f"mithridate loop {config.name} OUT",
        responses=[_shown_response(effects) for effects in attacks],
        notes=notes,
    )
    path = out / REPORT
    write(str(path), page.encode())
    console.print(f"report: {path}")


def _responses(arms: Rows) -> "tuple[list[list[Effect]], list[str]]":
    """Of the attacks that were tried at enough doses to tell how much poison they take."""
    from pipeline.dose_response import responses

    doses: dict[str, set[int]] = {}
    for arm in arms:
        doses.setdefault(arm["attack"], set()).update({arm["dose"]} - {0})
    return responses([arm for arm in arms if len(doses[arm["attack"]]) >= DOSES])


def verdict(arms: Rows, responses: "Sequence[Sequence[Effect]]" = ()) -> str:
    """Sentences on each attack and dose that was tried undefended; one below its floor credits nobody.

    An attack with a dose-response is told by that: its doses may be those at which it works half of the time.
    """
    told = {effects[0].attack: _of_doses(effects) for effects in responses}
    groups = dict.fromkeys((a["attack"], a["dose"]) for a in arms if a["arm"] == UNDEFENDED and a["dose"])
    if not groups:
        return "Nothing is poisoned here: what counts is what each filter costs."
    alone = [group for group in groups if group[0] not in told]
    return " ".join(
        [*told.values(), *(_sentences([a for a in arms if (a["attack"], a["dose"]) == group]) for group in alone)]
    )


def _of_doses(effects: "Sequence[Effect]") -> str:
    """Of one attack, undefended first."""
    none, name = effects[0], spec.parse_call(effects[0].attack)[0]
    if none.said == "does not rise":
        return f"Undefended, the success of {name!r} does not rise with the dose, so nobody can be credited."
    if none.said != "reached":
        return f"Undefended, {name!r}: half success is {none.said} ({none.ed50} ppm)."
    said = f"Undefended, {name!r} succeeds half of the time at {none.ed50} ppm."
    factors = {one.key: one.protection for one in effects[1:] if one.protection and one.protection.least}
    tried = {key: factor for key, factor in factors.items() if key.kind != "control"}
    if not tried:
        return said
    best, names = max(tried, key=lambda key: tried[key].least), {one.key: one.label for one in effects}
    control = next((f"; random removal has {factor}" for key, factor in factors.items() if _at_random(key)), "")
    return f"{said} The highest protection factor is that of {names[best]}, {tried[best]}{control}."


def _at_random(arm: ArmKey) -> bool:
    return arm.arm.partition("(")[0] == "random"


def _shown_response(effects: "Sequence[Effect]") -> dict[str, Any]:
    """A table for the page."""
    from pipeline.dose_response import lost_text

    rows = [
        (
            one.label,
            str(one.ed50),
            str(one.protection or "–"),
            lost_text(one),
            str(len(one.trials.seeds)),
            str(int((one.trials.dose > 0).sum())),
        )
        for one in effects
    ]
    return {"attack": effects[0].attack, "measure": effects[0].measure, "rows": rows}


def _sentences(arms: Rows) -> str:
    success = next((name for name in SUCCESS if any(arm.get(name) is not None for arm in arms)), SUCCESS[0])
    asr, accuracy = _means(arms, success), _means(arms, "zeroshot_top1")
    undefended = asr.get(ArmKey(UNDEFENDED))
    attack, dose, ppm = spec.parse_call(arms[0]["attack"])[0], arms[0]["dose"], arms[0]["dose_ppm"]
    start = f"Undefended, {dose:,} poisons of {attack!r} ({ppm:,.0f} ppm)"
    if undefended is None:
        return f"{start} were asked of no image: nobody knows whether they work."
    start += f" reach an attack success rate of {undefended:.1%}."
    if undefended < VALID_ASR:
        return f"{start} Below {VALID_ASR:.0%} the attack is not valid: no filter is credited for its failure."
    tried = {key: rate for key, rate in asr.items() if key.kind in ("filter", "defense")}
    if not tried:
        return start
    best = min(tried, key=lambda key: tried[key])
    control = next((f"; random removal leaves {rate:.1%}" for key, rate in asr.items() if _at_random(key)), "")
    kind = "filter or defense" if any(key.kind == "defense" for key in tried) else "filter"
    said = f"{start} The best {kind} here, {labels(arms)[best]}, leaves {tried[best]:.1%}{control}."
    if best in accuracy and ArmKey(UNDEFENDED) in accuracy:
        more = accuracy[best] - accuracy[ArmKey(UNDEFENDED)]
        said += f" It changes zero-shot accuracy by {100 * more:+.1f} points."
    return said


def _means(arms: Rows, measure: str) -> dict[ArmKey, float]:
    """Mean over seeds of a measure, without who was not asked."""
    out: dict[ArmKey, list[float]] = {}
    for arm in arms:
        if arm[measure] is not None:
            out.setdefault(ArmKey.of(arm), []).append(arm[measure])
    return {key: float(np.mean(values)) for key, values in out.items()}


def _facts(plan: Config, arms: Rows) -> dict[str, str]:
    """What all rows have in common, or from where to where they go."""
    from pipeline.cli import version_text

    first = arms[0]
    attacks, doses = (dict.fromkeys(arm[name] for arm in arms) for name in ("attack", "dose"))
    ppm = sorted(arm["dose_ppm"] for arm in arms)
    dose = f"{first['dose']:,} pairs = {ppm[0]:,.0f} ppm"
    if len(doses) > 1:
        dose = f"{len(doses)} from {min(doses):,} to {max(doses):,} pairs = {ppm[0]:,.0f} to {ppm[-1]:,.0f} ppm"
    return {
        "Pairs": f"{max(arm['samples'] for arm in arms):,}",
        "Attack": first["attack"] if len(attacks) == 1 else f"{len(attacks)}: {', '.join(attacks)}",
        "Dose": dose,
        "Recipe": plan.recipe,
        "Seeds": f"{len(plan.seeds)} ({', '.join(map(str, plan.seeds))})",
        "All runs took": hours(sum(arm["seconds"] for arm in arms) / 3600),
        "Version": version_text(),
    }


def _shown(plan: Config) -> list[tuple[Scores, str]]:
    """Scores and detector of the arms that were trained, controls aside."""
    named = []
    for arm in plan.filters:
        there = {
            f"{scores_folder(scored.epoch)}:{name}": (scored, name)
            for scored in plan.scores
            if scored.epoch in arm.epochs and scored.pool == POOL
            for name in (spec.text(spec.parse("detectors", text)) for text in scored.detectors)
        }
        named += [there[column(there, name)] for name in spec.parse("policies", arm.policy).detectors]
    return [pair for pair in dict.fromkeys(named) if not is_control(pair[1])]


def _histograms(plan: Config, run: "Run") -> list[report.Separation]:
    out = []
    for scored in plan.scores:
        found, poisoned = run.scores_and_truth(scored)
        for name in (n for n in found if n != "uid" and not is_control(n)):
            out.append(report.Separation(name, scored.when, found[name][~poisoned], found[name][poisoned]))
    return out


def _galleries(plan: Config, run: "Run") -> dict[str, list[report.Tile]]:
    chosen: dict[str, list[tuple[str, float]]] = {}
    for scored, detector in _shown(plan):
        found, _ = run.scores_and_truth(scored)
        name = column(found, detector)
        worst = np.argsort(keys(found[name], found["uid"]))[::-1][:TILES]
        chosen[f"{name}, {scored.when}"] = [(found["uid"][row], float(found[name][row])) for row in worst]
    before = {row["uid"]: row["caption_before"] for row in ledger.read(ledger.ledger_path(run.poisoned)).to_pylist()}
    wanted = {uid for tiles in chosen.values() for uid, _ in tiles}
    pictures = {s.uid: s for shard in list_shards(run.poisoned) for s in samples(shard, plan.uid) if s.uid in wanted}
    return {
        title: [_tile(pictures[uid], score, uid in before, before.get(uid)) for uid, score in tiles]
        for title, tiles in chosen.items()
    }


def _tile(sample: Sample, score: float, poison: bool, before: str | None) -> report.Tile:
    try:
        image = sample.image
    except Rejected:
        image = b""
    try:
        caption = sample.caption
    except Rejected as error:
        caption = f"({error})"
    return report.Tile(image, caption, sample.uid, score, poison, f"was: {before}" if before else "")

"""ED50 of every attack under every arm, protection factors, and the figures, from results.parquet alone.

Trade-off: nothing is trained or read beside the results, so a figure can be made anywhere; what the loop has not
measured is told as not measured. docs/dose_response.md says what the numbers mean.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pipeline import results, spec
from pipeline.arguments import Out
from pipeline.arms import UNDEFENDED, ArmKey, labels
from pipeline.bioassay import UNKNOWN, Curve, Estimate, Trials, ed50, fit, mean_over_seeds, protection
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.report.text import code, named
from pipeline.results import REPORT, Row
from pipeline.shards.store import make_folder, write
from train.results import SUCCESS

UTILITY = "zeroshot_top1"
FEW = 3  # seeds
FALL = 0.2  # of success, from a lower dose to the highest: more than seeds differ by
WITHOUT_POISON, SAME_DOSES = "undefended, both without poison", "undefended at the same doses"


def dose_response(
    table: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RESULTS")],
    out: Out,
    /,
) -> int:
    """ED50, protection factor, utility lost and cost of every arm, with 95% intervals and figures.

    Writes OUT/dose_response.{parquet,json,md,svg,png} and OUT/protection.{svg,png}.

    Args:
        table: results.parquet of one loop or more, or their OUT folders; of one recipe and data.
        out: folder for tables and figures.
    """
    rows, notes = _together(table)
    attacks, told = responses(rows)
    notes += told
    effects = [effect for attack in attacks for effect in attack]
    folder = Path(out)
    make_folder(str(folder))
    records = [effect.record for effect in effects]
    results.write_rows(folder / "dose_response.parquet", records)
    facts = {"notes": notes, "versions": results.versions(rows), "effects": records}
    write(str(folder / "dose_response.json"), json.dumps(facts, indent=1).encode())
    said = markdown(attacks, [*notes, *results.versions(rows)])
    write(str(folder / "dose_response.md"), said.encode())
    from pipeline.report.figures import dose_response_figure, protection_figure, save

    drawn = {"dose_response": dose_response_figure(attacks), "protection": protection_figure(attacks)}
    for name, figure in drawn.items():
        for kind in ("svg", "png"):  # of other results, perhaps
            Path(folder, f"{name}.{kind}").unlink(missing_ok=True)
        if figure is not None:
            save(figure, folder / name)
    print(said)
    without = ", ".join(name for name, figure in drawn.items() if figure is None)
    console.print(f"{folder}: tables" + (f"; nothing to draw for {without}" if without else " and figures"))
    return 0


@dataclass(frozen=True)
class Effect:
    """One arm under one attack.

    `lost`: points of zero-shot top-1, with its 95% interval. `cost`: core-seconds of the filter a million pairs.
    `training`: core-seconds beyond those of a plain training, a million pairs.
    """

    attack: str
    key: ArmKey
    label: str
    measure: str
    trials: Trials
    against: Trials
    lost: tuple[float, float, float] | None
    lost_against: str
    cost: float | None
    training: float | None
    pairs_per_ppm: float

    @cached_property
    def ed50(self) -> Estimate:
        return UNKNOWN if falls(self.trials) else ed50(self.trials)

    @cached_property
    def curve(self) -> Curve | None:
        return None if falls(self.trials) else fit(self.trials)

    @cached_property
    def protection(self) -> Estimate | None:
        """None of the undefended arm itself."""
        if self.key.kind == UNDEFENDED:
            return None
        return UNKNOWN if falls(self.trials) or falls(self.against) else protection(self.trials, self.against)

    @property
    def said(self) -> str:
        """Whether the ED50 is known, and if not, why."""
        if falls(self.trials):
            return "does not rise"
        if self.ed50 == UNKNOWN:
            return "no dose was tried"
        if self.ed50.known:
            return "reached"
        return "not reached" if self.ed50.most == float("inf") else "below the lowest dose"

    @property
    def runs(self) -> int:
        """Poisoned ones: those of dose 0 may be the undefended arm's."""
        return int((self.trials.dose > 0).sum())

    @property
    def record(self) -> Row:
        """A row of dose_response.parquet; open ends of intervals are null."""
        doses, curve = self.trials.doses, self.curve
        row: Row = {"attack": self.attack, **self.key._asdict(), "label": self.label}
        row |= {"measure": self.measure, "runs": self.runs, "seeds": len(self.trials.seeds)}
        row |= {"images": int(self.trials.n[self.trials.dose > 0].sum()), "doses": len(doses)}
        row |= {"lowest_ppm": float(doses[0]) if len(doses) else None}
        row |= {"highest_ppm": float(doses[-1]) if len(doses) else None, "ed50": self.said}
        row |= _columns("ed50_ppm", self.ed50) | {"ed50_pairs": None}
        if self.ed50.known:
            row["ed50_pairs"] = self.ed50.least * self.pairs_per_ppm
        row |= _columns("protection", self.protection or UNKNOWN)
        low, high = self.lost[1:] if self.lost else (None, None)
        row |= {"utility_lost_points": self.lost[0] if self.lost else None, "utility_lost_low": low}
        row |= {"utility_lost_high": high, "utility_lost_against": self.lost_against}
        row |= {"cpu_seconds_per_million": self.cost, "training_cpu_seconds_per_million": self.training}
        for name in ("middle", "slope", "lower", "upper"):
            row[f"curve_{name}"] = getattr(curve, name) if curve else None
        return row


def falls(trials: Trials) -> bool:
    """Whether it works at some dose and clearly less, below one half, at the highest."""
    trials = trials.balanced  # a dose of the easy seeds alone is no evidence
    rates = [float(np.mean((trials.k / trials.n)[trials.dose == dose])) for dose in trials.doses]
    return bool(rates) and rates[-1] < 0.5 <= max(rates) and max(rates) - rates[-1] > FALL


def _columns(name: str, estimate: Estimate) -> Row:
    """`name` (null unless known), what it is at least and at most, and the interval."""
    row: Row = {name: estimate.least if estimate.known else None}
    for end in ("least", "most", "low", "high"):
        value = getattr(estimate, end)
        row[f"{name}_{end}"] = value if 0 < value < float("inf") else None
    return row


def _together(paths: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows of all files, each run once, and what a reader has to be told of them."""
    tables = {path: results.read(path) for path in paths}
    unfinished = [path for path in paths if Path(path).is_dir() and not Path(path, REPORT).exists()]
    together = [row for table in tables.values() for row in table]
    if differ := results.several(together):
        raise InputError(f"results of several {' and '.join(differ)}: an ED50 belongs to one, give them one at a time")
    found: dict[tuple[Any, ...], Row] = {}
    for path, table in tables.items():
        for row in table:
            key = (row["attack"], row["dose_ppm"], row["seed"], ArmKey.of(row))
            if key in found and any(found[key].get(name) != row.get(name) for name in (*SUCCESS, UTILITY)):
                raise InputError(
                    f"{path}: {code(row['attack'])}, {row['dose']} poisons, seed {row['seed']}, {named(row['arm'])} is "
                    "there twice, with other figures; leave one of the two out (`mithridate compare` shows how two "
                    "results differ)"
                )
            found.setdefault(key, row)
    rows = list(found.values())
    notes = [f"The loop of {code(path)} has not ended: what is missing may change all of this." for path in unfinished]
    if len({row.get("code") for row in rows}) > 1:
        notes.append("Results of mixed code versions, listed below.")
    return rows, notes


def responses(rows: Sequence[Row]) -> tuple[list[list[Effect]], list[str]]:
    """The effects of each attack, undefended first, and what a reader has to be told of them."""
    names, notes = labels(rows), list[str]()
    return [_attack(attack, rows, names, notes) for attack in dict.fromkeys(row["attack"] for row in rows)], notes


def _attack(attack: str, rows: Sequence[Row], names: dict[ArmKey, str], notes: list[str]) -> list[Effect]:
    """Its arms, undefended first."""
    mine = [row for row in rows if row["attack"] == attack]
    measure = next((name for name in SUCCESS if any(row.get(f"{name}_n") for row in mine)), None)
    if measure is None:
        notes.append(f"{code(attack)}: success was asked of no image; is there an evaluation image of another class?")
    measure = measure or SUCCESS[0]
    clean = {row["seed"]: row for row in mine if row["dose"] == 0 and row["arm"] == UNDEFENDED}
    none = [row for row in mine if row["arm"] == UNDEFENDED]
    keys = sorted({ArmKey.of(row) for row in mine}, key=lambda key: (key.kind != UNDEFENDED, list(names).index(key)))
    undefended = _trials(none, measure)
    effects = []
    for key in keys:
        own = [row for row in mine if ArmKey.of(row) == key]
        # a model that nobody poisoned tells the lower end; of the arm's own, or else of none
        control = [] if any(row["dose"] == 0 for row in own) else list(clean.values())
        trials = undefended if key.kind == UNDEFENDED else _trials([*own, *control], measure)
        lost, lost_against = _lost(own, clean, none)
        per_ppm = next((row["dose"] / row["dose_ppm"] for row in mine if row["dose_ppm"]), 0.0)
        cost, training = _mean(row.get("filter_cpu_seconds_per_million") for row in own), _training(own, none)
        effects.append(
            Effect(attack, key, names[key], measure, trials, undefended, lost, lost_against, cost, training, per_ppm)
        )
    doses = {dose for effect in effects for dose in effect.trials.doses.tolist()}
    if not doses:
        why = "success was measured of no poisoned run" if any(row["dose"] for row in mine) else "nothing was poisoned"
        notes.append(f"{code(attack)}: {why}, so there is no dose–response.")
    elif not none:
        notes.append(f"{code(attack)}: never tried undefended, so there are no protection factors.")
    elif effects[0].said == "not reached":
        notes.append(f"{code(attack)}: not reached undefended at the highest dose: nobody is credited for its failure.")
    if len(doses) == 1:
        notes.append(f"{code(attack)}: one dose, which tells on which side of one half success is, and no ED50.")
    if falling := [named(one.label) for one in effects if falls(one.trials)]:
        notes.append(
            f"{code(attack)}: success does not rise with the dose of {', '.join(falling)}: no ED50, no factor."
        )
    notes += _about_seeds(attack, effects)
    return effects


def _about_seeds(attack: str, effects: Sequence[Effect]) -> Iterator[str]:
    """Which arms have few seeds, and which have others than the undefended one."""
    few: dict[int, list[str]] = {}
    for one in effects:
        if len(one.trials.doses) and (seeds := len(one.trials.seeds)) < FEW:
            few.setdefault(seeds, []).append(one.label)
    for seeds, arms in few.items():
        who = "" if len(arms) == len(effects) else f" of {', '.join(map(named, arms))}"
        only = "the interval is over images, not trainings" if seeds == 1 else "intervals are wide"
        yield f"{code(attack)}: {seeds} seed{'s' * (seeds != 1)}{who}: {only}."
    for one in effects:
        theirs, against = one.trials.seeds, one.against.seeds
        if theirs and against and theirs != against:
            yield (
                f"{code(attack)}: {named(one.label)} has seeds {_listed(theirs)}, undefended {_listed(against)}: no "
                "protection factor, for the seeds that are missing may be the hard ones."
            )


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _trials(rows: Sequence[Row], measure: str) -> Trials:
    asked = [(row, int(row.get(f"{measure}_n") or 0)) for row in rows if row.get(measure) is not None]
    return Trials.of([(row["seed"], row["dose_ppm"], round(row[measure] * n), n) for row, n in asked if n])


def _lost(
    own: Sequence[Row], clean: dict[int, Row], none: Sequence[Row]
) -> tuple[tuple[float, float, float] | None, str]:
    """Points of zero-shot top-1 lost against the undefended model, paired by seed and dose, and what it is against.

    At dose 0 where the arm has it: bisected doses differ from arm to arm, and poison costs accuracy too.
    """
    without = [row for row in own if row["dose"] == 0 and row["seed"] in clean]
    against = WITHOUT_POISON if without else SAME_DOSES
    control = [*clean.values()] if without else none
    same = {(row["seed"], row["dose_ppm"]): row for row in control}
    by_seed: dict[int, list[tuple[float, float]]] = {}
    had: list[float] = []
    for row in without or own:
        other = same.get((row["seed"], row["dose_ppm"]))
        if other is None or other is row or row.get(UTILITY) is None or other.get(UTILITY) is None:
            continue
        variance = sum(r[UTILITY] * (1 - r[UTILITY]) / max(r[f"{UTILITY}_n"] or 1, 1) for r in (row, other))
        by_seed.setdefault(row["seed"], []).append((100 * (other[UTILITY] - row[UTILITY]), 1e4 * variance))
        had.append(100 * other[UTILITY])
    if not by_seed:
        return None, against
    lost, low, high = mean_over_seeds(list(by_seed.values()))
    least, most = max(had) - 100, max(had)  # two seeds allow for anything, but not for losing what nobody had
    return (lost, max(low, least), min(high, most)), against


def _training(own: Sequence[Row], none: Sequence[Row]) -> float | None:
    """Core-seconds of a defense beyond a plain training, a million pairs; of a repair all of them are beyond."""
    plain, pairs = _mean(row.get("train_cpu_seconds") for row in none), _mean(row.get("samples") for row in none)
    spent = _mean(row.get("train_cpu_seconds") for row in own)
    defense = own[0].get("defense")
    if not defense or spent is None or plain is None or not pairs:
        return None
    try:
        repairs = spec.entry("defenses", spec.parse_call(defense)[0]).needs_init  # type: ignore[attr-defined]
    except InputError:  # of other code
        return None
    return 1e6 * (spent if repairs else spent - plain) / pairs


def _mean(values: Any) -> float | None:
    there = [float(value) for value in values if value is not None]
    return sum(there) / len(there) if there else None


def lost_text(effect: Effect) -> str:
    """Points of top-1 with their interval."""
    return "–" if effect.lost is None else "{:+.1f} ({:+.1f} – {:+.1f})".format(*effect.lost)


def markdown(attacks: Sequence[Sequence[Effect]], notes: Sequence[str]) -> str:
    """A table an attack."""
    heads = "arm|ED50, ppm (95%)|pairs|protection factor (95%)|top-1 lost, points (95%)|core-s per 10⁶ pairs|seeds|runs"
    lines = []
    for effects in attacks:
        lines += [f"### {code(effects[0].attack)} by {effects[0].measure}", "", f"| {heads.replace('|', ' | ')} |"]
        lines.append("|---" * (heads.count("|") + 1) + "|")
        for one in effects:
            cost = "–" if one.cost is None else f"{one.cost:,.0f}"
            cost += "" if one.training is None else f" (training: {one.training:+,.0f})"
            pairs = f"{one.ed50.least * one.pairs_per_ppm:,.0f}" if one.ed50.known else one.said
            factor = "–" if one.protection is None else str(one.protection)
            lines.append(
                f"| {named(one.label)} | {one.ed50} | {pairs} | {factor} | {lost_text(one)} | {cost} "
                f"| {len(one.trials.seeds)} | {one.runs} |"
            )
        losing = [one for one in effects if one.lost]
        for against in dict.fromkeys(one.lost_against for one in losing):
            of = [named(one.label) for one in losing if one.lost_against == against]
            by = f" by {', '.join(of)}" if len(of) < len(losing) else ""
            lines += ["", f"Top-1 lost{by} is against: {against}."]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


if __name__ == "__main__":
    from pipeline.cli import run

    run("dose-response")

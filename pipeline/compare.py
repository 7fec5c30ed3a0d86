"""What is different between two results or two audits: before and after a filter, last month and this month.

Trade-off: arms are compared as they are called, so an arm whose spec has changed is only in one of the two; what has
changed in the code under the same name is told by the versions.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pipeline import results
from pipeline.arms import ArmKey, labels
from pipeline.bioassay import mean_over_seeds
from pipeline.errors import InputError
from pipeline.report.text import code, named
from pipeline.results import Row
from train.metrics import Z95, Rate, newcombe, wilson
from train.results import judged

# What a folder holds -> who compares two of them: (A, B) -> Markdown. A file that is given is known by its name.
KINDS = {
    results.FILE: "pipeline.compare:compare_results",
    "audit.json": "pipeline.audits._compare:compare_audits",
}
MEASURED = ("success", "zeroshot_top1", "knn_top1")
Group = tuple[str, str, ArmKey]


def compare(
    before: Annotated[str, tyro.conf.arg(metavar="A")],
    after: Annotated[str, tyro.conf.arg(metavar="B")],
    /,
) -> int:
    """What is different in B from A, as Markdown with 95% intervals; both of one kind.

    Args:
        before: OUT of a loop or of an audit, or its results.parquet or audit.json.
        after: another one.
    """
    kinds = [_kind(where) for where in (before, after)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{before} holds {kinds[0]}, {after} {kinds[1]}: two of one kind can be compared")
    module, name = KINDS[kinds[0]].split(":")
    print(getattr(importlib.import_module(module), name)(before, after))
    return 0


def _kind(where: str) -> str:
    path = Path(where)
    found = [name for name in KINDS if (path / name).is_file() or (path.is_file() and path.suffix == Path(name).suffix)]
    if not found:
        raise InputError(f"{where}: nothing to compare here; there should be {' or '.join(KINDS)}")
    return found[0]


def compare_results(before: str, after: str) -> str:
    """Differences B - A of attack success and accuracy, arm by arm, of the seeds that both have."""
    old, new = results.read(before), results.read(after)
    new = _aligned(old, new)
    names = labels([*old, *new])
    one, two = _grouped(old), _grouped(new)
    heads = ["attack", "poisons, ppm", "arm", "attack success A → B", "difference (95%)", "top-1", "kNN top-1", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group in (group for group in one if group in two):
        seeds = {row["seed"] for row in one[group]} & {row["seed"] for row in two[group]}
        a, b = ([row for row in rows if row["seed"] in seeds] for rows in (one[group], two[group]))
        cells = [_difference(a, b, measure) for measure in MEASURED]
        shown = " → ".join(_percent(_mean(rows, MEASURED[0])) for rows in (a, b))
        label = named(names[group[2]])
        lines.append(f"| {code(group[0])} | {group[1]} | {label} | {shown} | {' | '.join(cells)} | {len(seeds)} |")
    lines.append("")
    for where, mine, other in (("A", one, two), ("B", two, one)):
        for group in (group for group in mine if group not in other):
            lines.append(f"- only in {where}: {code(group[0])}, {group[1]} ppm, {named(names[group[2]])}")
    both = {*one} & {*two}
    if both and not any({row["seed"] for row in one[g]} & {row["seed"] for row in two[g]} for g in both):
        lines.append("- no arm has a seed in both, so nothing is compared")
    if not both:
        lines.append("- nothing is in both")
    if any(len({row["seed"] for row in one[g]} & {row["seed"] for row in two[g]}) == 1 for g in both):
        lines.append("- with one seed an interval is over images, not trainings, and too narrow for these")
    for where, rows in (("A", old), ("B", new)):
        lines += [f"- {where}: {version}" for version in results.versions(rows)]
    if differ := results.several([*old, *new]):
        lines.append(f"- **not of the same {' and '.join(differ)}**: what differs may be theirs")
    if results.versions(old)[1:] or results.versions(new)[1:]:
        lines.append("- **mixed versions**: rows of one result are of different code or recipes")
    return "\n".join([*lines, ""])


def _grouped(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row["attack"], _ppm(row["dose_ppm"]), ArmKey.of(row)), []).append(row)
    return found


def _aligned(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`new` with the doses of `old` where whole pairs are all that is between: 1% is 9,999 ppm of 11,801 pairs."""
    a_pair = {(row["attack"], row["dose_ppm"]): row["dose_ppm"] / row["dose"] for row in old if row["dose"]}
    aligned = []
    for row in new:
        half = row["dose_ppm"] / row["dose"] / 2 if row["dose"] else 0.0
        near = [dose for attack, dose in a_pair if attack == row["attack"]]
        dose = min(near, key=lambda dose: abs(dose - row["dose_ppm"]), default=row["dose_ppm"])
        same = abs(dose - row["dose_ppm"]) <= half + a_pair.get((row["attack"], dose), 0.0) / 2
        aligned.append(row | {"dose_ppm": dose} if same else row)
    return aligned


def _ppm(dose: float) -> str:
    """Whole from 1,000 on; a dose above 0 is never called 0."""
    return f"{round(dose):,}" if dose >= 1000 else f"{dose:.4g}"


def _value(row: Row, measure: str) -> tuple[float | None, int]:
    """The rate and its n."""
    name = judged(row)[0] if measure == MEASURED[0] else measure
    return row.get(name), int(row.get(f"{name}_n") or 0)


def _mean(rows: Sequence[Row], measure: str) -> float | None:
    there = [value for row in rows if (value := _value(row, measure)[0]) is not None]
    return sum(there) / len(there) if there else None


def _difference(a: Sequence[Row], b: Sequence[Row], measure: str) -> str:
    """In points; of one seed the interval is over images alone."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    ends: tuple[float, ...] = ()
    for row in a:
        for other in b:
            found = newcombe(_rate(row, measure), _rate(other, measure)) if row["seed"] == other["seed"] else None
            if found:
                ends = tuple(100 * end for end in found)
                variance = ((ends[2] - ends[1]) / (2 * Z95)) ** 2  # above 0 where both rates are
                by_seed.setdefault(row["seed"], []).append((ends[0], variance))
    if not by_seed:
        return "–"
    alone = [len(found) for found in by_seed.values()] == [1]
    return "{:+.1f} ({:+.1f} – {:+.1f})".format(*(ends if alone else mean_over_seeds(list(by_seed.values()))))


def _rate(row: Row, measure: str) -> Rate:
    value, n = _value(row, measure)
    return Rate(None, 0, None, None) if value is None or not n else Rate(value, n, *wilson(round(value * n), n))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    from pipeline.cli import run

    run("compare")

"""Results -> rows a person reads, shared by the page and the terminal.

Runs that differ only in their seed become one row: the mean, and as its interval the range over seeds. A single seed
keeps its own Wilson interval, which covers the evaluation images and says nothing about another training
run; `caveat` says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.arms import UNDEFENDED, ArmKey, is_control
from pipeline.report.text import one_line

if TYPE_CHECKING:
    import polars as pl

BUDGETS = {"recall_at_1": 1, "recall_at_5": 5, "recall_at_10": 10}  # percent removed

# Measure -> its heading and whether a high value is the attacker's win.
MEASURES: dict[str, tuple[str, bool]] = {
    "asr_text": ("ASR, text", True),
    "asr_knn": ("ASR, neighbours", True),
    "asr_prototypes": ("ASR, prototypes", True),
    "asr_probe": ("ASR, linear probe", True),
    "asr_finetune": ("ASR, fine-tuned", True),
    "asr_t2i": ("ASR, text→image", True),
    "targeted_success": ("Targeted success", True),
    "triggered_accuracy": ("Accuracy with trigger", False),
    "triggered_accuracy_knn": ("Accuracy with trigger, neighbours", False),
    "triggered_accuracy_prototypes": ("Accuracy with trigger, prototypes", False),
    "triggered_accuracy_probe": ("Accuracy with trigger, linear probe", False),
    "triggered_accuracy_finetune": ("Accuracy with trigger, fine-tuned", False),
    "zeroshot_top1": ("Zero-shot accuracy", False),
    "zeroshot_top5": ("Zero-shot, top 5", False),
    "knn_top1": ("Neighbour accuracy", False),
    "prototypes_top1": ("Prototype accuracy", False),
    "probe_top1": ("Linear probe accuracy", False),
    "finetune_top1": ("Fine-tuned accuracy", False),
    "i2t_recall1": ("Image→text R@1", False),
    "i2t_recall5": ("Image→text R@5", False),
    "i2t_recall10": ("Image→text R@10", False),
    "t2i_recall1": ("Text→image R@1", False),
    "t2i_recall5": ("Text→image R@5", False),
    "t2i_recall10": ("Text→image R@10", False),
}
ATTACK_MEASURES = ("asr_text", "asr_knn", "targeted_success")
UTILITY_MEASURES = ("zeroshot_top1", "knn_top1", "t2i_recall5", "i2t_recall5", "zeroshot_top5")

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rate:
    """A measured share with its interval; `reference` is what to compare it with, `ceiling` the highest possible."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reference: float | None = None
    ceiling: float | None = None

    @property
    def percent(self) -> str:
        return f"{100 * self.value:.1f}%"

    @property
    def percent_interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f}–{100 * self.high:.1f}"

    @property
    def decimal(self) -> str:
        return f"{self.value:.3f}"

    @property
    def decimal_interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.3f}–{self.high:.3f}"


@dataclass(frozen=True)
class Row:
    """One arm or one detector."""

    number: int
    name: str
    notes: list[str]
    seeds: int
    rates: dict[str, Rate]
    texts: dict[str, str]

    @property
    def baseline(self) -> bool:
        return self.name == UNDEFENDED or is_control(self.name)


@dataclass
class Group:
    """The rows of one attack at one dose."""

    attack: str
    dose: str
    rows: list[Row] = field(default_factory=list)


def arm_groups(arms: "pl.DataFrame") -> list[Group]:
    """One row per arm, grouped by attack and dose, in the order they came."""
    groups: list[Group] = []
    runs = arms.to_dicts()
    recipes = {run.get("recipe") for run in runs}
    for (attack, dose), of_dose in _grouped(runs, "attack", "dose"):
        group = Group(one_line(str(attack)) if attack else "", _dose(dose, _mean(of_dose, "dose_ppm")))
        undefended = {m: r.value for m, r in _rates([r for r in of_dose if ArmKey.of(r).kind == UNDEFENDED]).items()}
        for (*key, recipe), same in _grouped(of_dose, *ArmKey._fields, "recipe"):
            arm, when, policy, defense, _ = key
            twins = [run for run in of_dose if run.get("arm") == arm]
            told_apart = {column: len({run.get(column) for run in twins}) > 1 for column in ArmKey._fields}
            notes = [f"scored at {when}"] if when and (told_apart["when"] or ArmKey(arm).kind == "filter") else []
            notes += [one_line(policy)] if policy and told_apart["policy"] else []
            notes += [one_line(defense)] if defense and told_apart["defense"] else []
            notes += [f"recipe {recipe}"] if recipe and len(recipes) > 1 else []
            left, put_in = _mean(same, "poisons_left"), _mean(same, "poisons_in")
            texts = {
                "samples": count(_mean(same, "samples")),
                "removed": count(_mean(same, "removed")),
                "poisons_left": count(left),
                "poisons_in": count(put_in),
                "train": duration(_mean(same, "train_seconds")),
                "filter": duration(_mean(same, "filter_seconds")),
                "cpu": duration(_mean(same, "filter_cpu_seconds_per_million")),
            }
            rates = _rates(same, {} if arm == UNDEFENDED else undefended)
            group.rows.append(Row(len(group.rows) + 1, one_line(str(arm)), notes, _seeds(same), rates, texts))
        groups.append(group)
    return groups


def detector_groups(detectors: "pl.DataFrame") -> list[Group]:
    """One row per detector and scoring time; marks what chance would reach and what a small budget allows."""
    groups: list[Group] = []
    for (attack, dose), of_dose in _grouped(detectors.to_dicts(), "attack", "dose"):
        ppm = _mean(of_dose, "dose_ppm")
        group = Group(one_line(str(attack)) if attack else "", _dose(dose, ppm))
        for (detector, when), same in _grouped(of_dose, "detector", "when"):
            n, poisons = _mean(same, "n"), _mean(same, "poisons")
            rates = {}
            if auroc := _rate(same, "auroc", reference=0.5):
                rates["auroc"] = auroc
            for measure, budget in BUDGETS.items():
                room = int(n * budget / 100) / poisons if n and poisons else 1.0
                if rate := _rate(same, measure, reference=budget / 100, ceiling=room if room < 1 else None):
                    rates[measure] = rate
            auprc = _mean(same, "auprc")
            texts = {
                "n": count(n),
                "poisons": count(poisons),
                "auprc": "" if auprc is None else f"{auprc:.3f}",
                "auprc_chance": f"{poisons / n:.3g}" if n and poisons is not None else "",
                "seconds": duration(_mean(same, "seconds")),
                "per_sample": microseconds(_mean(same, "microseconds_per_sample")),
            }
            notes = [str(when)] if when else []
            group.rows.append(Row(len(group.rows) + 1, one_line(str(detector)), notes, _seeds(same), rates, texts))
        groups.append(group)
    return groups


def measured(groups: Iterable[Group], measures: Iterable[str]) -> list[str]:
    """Those of `measures` that any row has, so that no column is empty."""
    seen = {m for g in groups for row in g.rows for m in row.rates}
    return [m for m in measures if m in seen]


def main_measures(groups: Sequence[Group]) -> list[str]:
    """The few an arm is judged by: every kind of attack success, accuracy under the trigger, one measure of use."""
    return (
        measured(groups, ATTACK_MEASURES)
        + measured(groups, ["triggered_accuracy"])
        + measured(groups, UTILITY_MEASURES)[:1]
    )


def shared_n(groups: Iterable[Group], measure: str) -> int | None:
    """The sample size of a column, where all its rows agree."""
    sizes = {row.rates[measure].n for g in groups for row in g.rows if measure in row.rates}
    return sizes.pop() if len(sizes) == 1 else None


def caveat(groups: Iterable[Group]) -> str:
    """What the intervals cover, which depends on the number of seeds."""
    seeds = sorted({row.seeds for g in groups for row in g.rows})
    if seeds == [1]:
        return (
            "One seed: the 95% intervals (Wilson) cover the evaluation images only, not the seeds. "
            "Another training run may differ by more."
        )
    if not seeds:
        return ""
    many = f"{seeds[-1]} seeds" if len(seeds) == 1 else f"Up to {seeds[-1]} seeds"
    one = " Rows with one seed show the 95% interval (Wilson) over evaluation images instead." if 1 in seeds else ""
    return f"{many}: each number is the mean, and below it the range from the lowest seed to the highest.{one}"


def count(value: float | None) -> str:
    """A whole number with separators; a mean over seeds keeps one decimal."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 100 or value == 0 else f"{value:.2g} {unit}"


def microseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g} µs" if value < 100 else f"{value:,.0f} µs" if value < 10_000 else f"{value / 1000:,.0f} ms"


def ppm(value: float) -> str:
    return f"{value:,.0f} ppm" if value >= 100 else f"{value:.3g} ppm"


def _dose(dose: Any, parts: float | None) -> str:
    if not dose:
        return "no poison"
    pairs = f"{dose:,} poisoned pair{'' if dose == 1 else 's'}" if isinstance(dose, int) else one_line(str(dose))
    return pairs if parts is None else f"{pairs}, {ppm(parts)}"


def _grouped(runs: Iterable[Values], *columns: str) -> list[tuple[tuple[Any, ...], list[Values]]]:
    groups: dict[tuple[Any, ...], list[Values]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(c) for c in columns), []).append(run)
    return list(groups.items())


def _seeds(runs: Sequence[Values]) -> int:
    return len({run.get("seed") for run in runs})


def _numbers(runs: Iterable[Values], column: str) -> list[float]:
    """Its finite values; a null or NaN is no measurement."""
    values = [run.get(column) for run in runs]
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def _mean(runs: Iterable[Values], column: str) -> float | None:
    values = _numbers(runs, column)
    return sum(values) / len(values) if values else None


def _rate(
    runs: Sequence[Values], measure: str, reference: float | None = None, ceiling: float | None = None
) -> Rate | None:
    values = _numbers(runs, measure)
    if not values:
        return None
    if len(values) > 1:
        low, high = min(values), max(values)
    else:
        run = [r for r in runs if _numbers([r], measure)]
        low, high = _mean(run, f"{measure}_low"), _mean(run, f"{measure}_high")  # type: ignore[assignment]
    sizes = set(_numbers(runs, f"{measure}_n"))
    return Rate(sum(values) / len(values), low, high, int(sizes.pop()) if len(sizes) == 1 else None, reference, ceiling)


def _rates(runs: Sequence[Values], references: Mapping[str, float] | None = None) -> dict[str, Rate]:
    found = {m: _rate(runs, m, reference=(references or {}).get(m)) for m in MEASURES}
    return {m: rate for m, rate in found.items() if rate}

"""The geometry of the charts; `parts.html` draws it as inline SVG.

Hand-made instead of matplotlib's SVG: text stays text, colours follow the reader's light or dark mode through the style
sheet, and nothing needs an inline style, which the page's content policy forbids. Ticks are matplotlib's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.tables import ATTACK_MEASURES, MEASURES, UTILITY_MEASURES, Group, Rate, count, measured

if TYPE_CHECKING:
    from pipeline.report import Separation

BINS = 48
BUDGET = 5  # percent, whose removal the histograms mark
Tick = tuple[float, str]  # where, and what it says


@dataclass(frozen=True)
class Point:
    """An arm: its dot, its whiskers, and the place of its number."""

    number: int
    baseline: bool
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    label: tuple[float, float]
    far: bool


@dataclass(frozen=True)
class Scatter:
    """Accuracy to the right, attack success upwards; both in percent."""

    group: Group
    x_measure: str
    y_measure: str
    x_name: str
    y_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]

    width, height = 460, 360
    left, right, top, bottom = 50, 14, 16, 46


@dataclass(frozen=True)
class Bars:
    """A mirrored histogram: clean grows up from the axis, poison down, each as a share of its own kind."""

    detector: str
    when: str
    clean: str
    poison: str
    ticks: list[Tick]
    cut: float | None
    log: bool
    caption: str

    width, height, axis, reach = 340, 178, 82, 72


@dataclass(frozen=True)
class Tail:
    """A histogram with its fence: what lies above is drawn in the colour of suspicion."""

    title: str
    bulk: str
    tail: str
    ticks: list[Tick]
    fence: float | None
    caption: str

    width, height, axis, reach = 340, 128, 104, 96


def scatters(groups: Sequence[Group]) -> list[Scatter]:
    """One chart per attack and dose that has both measures, all on the same axes."""
    ys, xs = measured(groups, ATTACK_MEASURES), measured(groups, UTILITY_MEASURES)
    if not ys or not xs:
        return []
    y, x = ys[0], xs[0]
    usable = [row for g in groups for row in g.rows if x in row.rates and y in row.rates]
    edges = [e for row in usable for e in _ends(row.rates[x])]
    if not edges:
        return []
    low, high = min(edges), max(edges)
    spare = max(0.0, 0.1 - (high - low)) / 2 + 0.01  # at least ten points wide, or noise would look like an effect
    low, high = max(0.0, low - spare), min(1.0, high + spare)
    return [_scatter(g, x, y, low, high) for g in groups if any(x in r.rates and y in r.rates for r in g.rows)]


def _scatter(group: Group, x: str, y: str, low: float, high: float) -> Scatter:
    inner = (Scatter.width - Scatter.left - Scatter.right, Scatter.height - Scatter.top - Scatter.bottom)

    def across(value: float) -> float:
        return Scatter.left + inner[0] * (min(max(value, low), high) - low) / (high - low)

    def up(value: float) -> float:
        return Scatter.top + inner[1] * (1 - min(max(value, 0.0), 1.0))

    rows = [row for row in group.rows if x in row.rates and y in row.rates]
    dots = [(across(row.rates[x].value), up(row.rates[y].value)) for row in rows]
    points = []
    for row, dot, (label, far) in zip(rows, dots, _labels(dots), strict=True):
        (x_low, x_high), (y_low, y_high) = _ends(row.rates[x]), _ends(row.rates[y])
        points.append(
            Point(row.number, row.baseline, *dot, across(x_low), across(x_high), up(y_low), up(y_high), label, far)
        )
    return Scatter(
        group=group,
        x_measure=x,
        y_measure=y,
        x_name=MEASURES[x][0],
        y_name=MEASURES[y][0],
        x_ticks=[(across(t), f"{100 * t:.3g}%") for t in _ticks(low, high)],
        y_ticks=[(up(t), f"{100 * t:.0f}%") for t in (0, 0.25, 0.5, 0.75, 1)],
        points=points,
    )


def _labels(dots: Sequence[tuple[float, float]]) -> list[tuple[tuple[float, float], bool]]:
    """A free place near each dot for its number: the nearest of 24 that touches no dot and no earlier number."""
    placed: list[tuple[float, float]] = []
    far: list[bool] = []
    for x, y in dots:
        best = (math.inf, (x, y), False)
        for radius in (15, 26, 38):
            for rank, angle in enumerate((315, 225, 270, 45, 135, 90, 0, 180)):  # off the whiskers first
                spot = (x + radius * math.cos(math.radians(angle)), y + radius * math.sin(math.radians(angle)))
                clash = sum(math.dist(spot, d) < 12 for d in dots) + sum(math.dist(spot, p) < 15 for p in placed)
                outside = not (
                    Scatter.left + 8 < spot[0] < Scatter.width - 6
                    and Scatter.top < spot[1] < Scatter.height - Scatter.bottom - 8
                )
                cost = 100 * outside + 10 * clash + radius / 100 + rank / 1000
                best = min(best, (cost, spot, radius > 15))
        placed.append(best[1])
        far.append(best[2])
    return list(zip(placed, far, strict=True))


def _ends(rate: Rate) -> tuple[float, float]:
    return (
        rate.value if rate.low is None else rate.low,
        rate.value if rate.high is None else rate.high,
    )


def bars(histogram: "Separation") -> Bars:
    """Bins over the middle 99% of either kind; what lies beyond is counted in the end bins and stated."""
    clean, poison = (_finite(scores) for scores in (histogram.clean, histogram.poison))
    lost = np.size(histogram.clean) + np.size(histogram.poison) - len(clean) - len(poison)
    kinds = [scores for scores in (clean, poison) if len(scores)]
    said = [f"{count(len(clean))} clean, {count(len(poison))} poison."]
    if lost:
        said.append(f"Without a finite score, not drawn: {count(lost)}.")
    if not kinds:
        return Bars(histogram.detector, histogram.when, "", "", [], None, False, " ".join(said))
    low = min(float(np.quantile(s, 0.005)) for s in kinds)
    high = max(float(np.quantile(s, 0.995)) for s in kinds)
    constant = high - low <= 1e-6 * max(abs(low), abs(high))
    if constant:
        low, high = low - max(0.5, abs(low) / 100), high + max(0.5, abs(high) / 100)
    log = low > 0 and high / low > 100

    def place(scores: np.ndarray) -> np.ndarray:
        inside = np.clip(scores, low, high)
        return np.log(inside / low) / math.log(high / low) if log else (inside - low) / (high - low)

    shares = [np.histogram(place(s), bins=BINS, range=(0, 1))[0] / max(1, len(s)) for s in (clean, poison)]
    scale = Bars.reach / max(share.max() for share in shares)
    every = np.concatenate(kinds)
    beyond = int(((every < low) | (every > high)).sum())
    medians = [f"{kind} {_number(np.median(s))}" for s, kind in ((clean, "clean"), (poison, "poison")) if len(s)]
    said.append(f"Median: {', '.join(medians)}.")
    if constant:
        said.append("All scores are the same.")
    elif beyond:
        said.append(f"Beyond the axis, counted in the end bins: {count(beyond)}.")
    if log:
        said.append("Logarithmic axis.")
    last = None if constant else _last_removed(histogram)
    cut = None if last is None else float(place(np.asarray(last))) * Bars.width
    marks = _decades(low, high) if log else _ticks(low, high, 4)
    return Bars(
        detector=histogram.detector,
        when=histogram.when,
        clean=_outline(shares[0] * -scale),
        poison=_outline(shares[1] * scale),
        ticks=[(float(place(np.asarray(t))) * Bars.width, _number(t)) for t in marks],
        cut=cut,
        log=log,
        caption=" ".join(said),
    )


def tail(title: str, edges: Sequence[float], counts: Sequence[int], n: int, fence: float | None) -> Tail:
    """Heights are logarithmic: ten pairs far out are seen beside a million that are not."""
    low, high = edges[0], edges[-1]
    heights = np.log10(1 + np.asarray(counts, np.float64))
    heights *= -Tail.reach / max(heights.max(), 1e-9)
    far = np.asarray(edges[:-1]) >= (math.inf if fence is None else fence)
    place = Tail.width / (high - low)
    within = fence is not None and low <= fence <= high
    said = [f"{count(n)} values; heights are logarithmic."]
    if fence is not None:
        where = f"Fence: {_number(fence)}" + ("." if within else ", outside of what occurs.")
        said.append(where)
    return Tail(
        title,
        _outline(np.where(far, 0, heights), Tail.axis),
        _outline(np.where(far, heights, 0), Tail.axis),
        [((t - low) * place, _number(t)) for t in _ticks(low, high, 4)],
        (fence - low) * place if fence is not None and within else None,
        " ".join(said),
    )


def _outline(heights: np.ndarray, axis: float = Bars.axis) -> str:
    """The steps of a histogram as one closed SVG path from the axis."""
    if not heights.any():
        return ""
    step = Bars.width / len(heights)
    steps = [f"V{axis + h:.1f}H{(i + 1) * step:.1f}" for i, h in enumerate(heights)]
    return f"M0 {axis}{''.join(steps)}V{axis}Z"


def _last_removed(histogram: "Separation") -> float | None:
    """The score down to which a removal of 5% goes; unscored pairs go first, as in the budget policy."""
    scores = np.concatenate([np.ravel(histogram.clean), np.ravel(histogram.poison)]).astype(np.float64)
    scores[np.isnan(scores)] = np.inf
    removed = len(scores) * BUDGET // 100
    if not removed:
        return None
    last = float(np.partition(scores, -removed)[-removed])
    return last if math.isfinite(last) else None


def _finite(scores: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # scores are float32 by contract; what overflows it is as good as infinite
        values = np.asarray(scores).astype(np.float32).astype(np.float64).ravel()
    return values[np.isfinite(values)]


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=most, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(v) for v in values if low <= v <= high]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**p for p in powers][:: max(1, len(powers) // 4)]

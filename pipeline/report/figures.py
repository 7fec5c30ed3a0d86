"""Figures for print: dose–response curves, and protection against its price.

Under each panel of curves lies a strip with a line an arm, at the same doses: its name, its ED50 with interval, and its
protection factor. So every curve is named where it crosses one half, and no legend has to be looked up.

Trade-off: matplotlib here, where the page draws its own SVG: these go into papers, as PDF would, and need no dark mode.
Colours are Okabe & Ito's (2008), told apart by the colour-blind, and two darker ones; beyond eight arms line styles
tell them apart too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from pipeline.arms import UNDEFENDED
from pipeline.report.text import one_line

if TYPE_CHECKING:
    from pipeline.dose_response import Effect

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#6A3D9A")
PLAIN, CONTROL = "#000000", "#8A8A8A"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "mithridate",
}
PANEL = 3.1  # inches of the doses, wide
MARGINS = 2.6  # inches of names and factors beside them
ACROSS = 2  # panels
HEIGHT = 1.9  # inches of the curves
ROW = 0.15  # inches of an arm in the strip
DECADE = 10.0  # an axis of less has no two numbers on it that are told apart


def save(figure: Figure, path: Path) -> None:
    """PATH.svg and PATH.png, the same bytes every time."""
    import matplotlib as mpl

    FigureCanvasAgg(figure)
    with mpl.rc_context(STYLE):
        figure.savefig(f"{path}.svg", metadata={"Date": None})
        figure.savefig(f"{path}.png", dpi=200, metadata={"Software": None})


def dose_response_figure(attacks: Sequence[Sequence["Effect"]]) -> Figure | None:
    """A panel an attack; None where no attack was tried at two doses."""
    import matplotlib as mpl

    shown = [found for effects in _of_doses(attacks) if (found := [one for one in effects if len(one.trials.doses)])]
    if not shown:
        return None
    looks = _looks([one for effects in attacks for one in effects])
    across = min(ACROSS, len(shown))
    grid = [shown[i : i + across] for i in range(0, len(shown), across)]
    strips = [max(map(len, row)) * ROW for row in grid]
    with mpl.rc_context(STYLE):
        heights = [HEIGHT + 0.65 + strip for strip in strips]
        layout = ConstrainedLayoutEngine(h_pad=0.02, hspace=0.02, wspace=0.03)
        figure = Figure(figsize=(PANEL * across + MARGINS, sum(heights)), layout=layout)
        rows = figure.subfigures(len(grid), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, row, strip in zip(rows, grid, strips, strict=True):
            axes = part.subplots(2, across, squeeze=False, sharex="col", height_ratios=[HEIGHT, strip])
            for column in range(across):
                if column < len(row):
                    named = column == 0 or [one.label for one in row[column]] != [one.label for one in row[0]]
                    _panel(axes[0, column], axes[1, column], row[column], looks, column == 0, named)
                    axes[1, column].set_ylim(strip / ROW - 0.4, -0.8)  # lines as close as in the panel beside it
                else:
                    for empty in axes[:, column]:
                        empty.set_axis_off()
    return figure


def _of_doses(attacks: Sequence[Sequence["Effect"]]) -> list[Sequence["Effect"]]:
    """Attacks of two doses and more: of one there is nothing to draw that the table does not say."""
    return [effects for effects in attacks if len({d for one in effects for d in one.trials.doses.tolist()}) > 1]


def _panel(
    curves: Axes, strip: Axes, effects: Sequence["Effect"], looks: dict[str, dict[str, Any]], first: bool, named: bool
) -> None:
    """Curves and strip of one attack; `named` where the names of its arms are not those of the panel to the left."""
    doses = np.concatenate([one.trials.doses for one in effects])
    low, high = _logarithmic(curves.xaxis, doses.min() / 1.25, doses.max() * 1.25)
    curves.set_ylim(-0.02, 1.02)
    curves.axhline(0.5, color="#BBBBBB", lw=0.6, zorder=0)
    for place, one in enumerate(effects):
        look = looks[one.label]
        _points(curves, one, look["color"])
        if one.curve and len(one.trials.doses) > 1:
            x = np.geomspace(one.trials.doses[0], one.trials.doses[-1], 200)
            curves.plot(x, one.curve.at(x), lw=1.3, **look)
        if one.ed50.known:  # from the crossing down to its name
            curves.plot([one.ed50.least] * 2, [-0.02, 0.5], color=look["color"], lw=0.5, ls=(0, (1, 2)), zorder=1)
            strip.plot([one.ed50.least] * 2, [-0.8, place], color=look["color"], lw=0.5, ls=(0, (1, 2)), zorder=1)
        _strip_row(strip, place, one, look, (low, high))
    curves.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    curves.set_title(_titled(effects[0].attack), fontsize=7, loc="left", family="monospace")
    if first:
        curves.set_ylabel("attack success")
    curves.tick_params(axis="x", labelbottom=False)
    strip.set_yticks(range(len(effects)), [_plain(one.label) if named else "" for one in effects])
    for tick, one in zip(strip.get_yticklabels(), effects, strict=True):
        tick.set_color(looks[one.label]["color"])
    strip.tick_params(axis="y", length=0)
    strip.spines["left"].set_visible(False)
    strip.set_xlabel("dose, poisons per million pairs")


def _logarithmic(axis: XAxis, low: float, high: float) -> tuple[float, float]:
    """The ends of a log axis from `low` to `high`, a decade at least, with as many numbers as have room."""
    wider = max(DECADE * low / high, 1.0) ** 0.5
    low, high = low / wider, high * wider
    axis.axes.set(xscale="log", xlim=(low, high))
    axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if high / low < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
    return low, high


def _points(axes: Axes, one: "Effect", colour: str) -> None:
    """Each dose: the mean over seeds, and their range; each seed a faint dot. Dose 0 is a dash at the left end."""
    trials = one.trials
    rate = trials.k / np.maximum(trials.n, 1)
    above = trials.dose > 0
    if not above.all():
        clean = rate[~above].mean()
        axes.plot([0, 0.03], [clean, clean], color=colour, lw=1.3, transform=axes.get_yaxis_transform(), zorder=3)
    axes.plot(trials.dose[above], rate[above], "o", ms=2, mfc="none", mec=colour, mew=0.5, alpha=0.6, zorder=2)
    for dose in trials.doses:
        seen = rate[trials.dose == dose]
        axes.plot([dose, dose], [seen.min(), seen.max()], color=colour, lw=0.7, alpha=0.6, zorder=2)
        axes.plot(dose, seen.mean(), "o", ms=3.6, color=colour, mec="white", mew=0.4, zorder=3)


def _strip_row(axes: Axes, place: int, one: "Effect", look: dict[str, Any], ends: tuple[float, float]) -> None:
    """The ED50 as a dot, its interval as a line; an end that is open has an arrowhead."""
    found, colour = one.ed50, look["color"]
    left, right = max(found.low, ends[0]), min(found.high, ends[1])
    if found.low == 0 and found.high == np.inf and not found.known and not (found.least or np.isfinite(found.most)):
        return
    axes.plot([left, right], [place, place], color=colour, lw=1.0, solid_capstyle="butt", zorder=2, clip_on=False)
    if found.high == np.inf:
        axes.plot(right, place, ">", ms=3.5, color=colour, clip_on=False, zorder=3)
    if found.low == 0:
        axes.plot(left, place, "<", ms=3.5, color=colour, clip_on=False, zorder=3)
    if found.known:
        axes.plot(found.least, place, "o", ms=4, color=colour, mec="white", mew=0.4, zorder=4)
    factor = "" if one.protection is None else str(one.protection)
    axes.annotate(
        _plain(factor or "protection factor (95%)"),
        (1.0, place),
        (7, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        color=colour if factor else "#555555",
        annotation_clip=False,
    )


def protection_figure(attacks: Sequence[Sequence["Effect"]]) -> Figure | None:
    """Protection factor against utility lost and against cost, a row an attack; None where no factor is known."""
    import matplotlib as mpl

    tried = _of_doses(attacks)
    shown = [found for effects in tried if (found := [one for one in effects if _place(one) is not None])]
    if not shown:
        return None
    looks = _looks([one for effects in attacks for one in effects])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * PANEL + 1.6, 2.3 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 2, squeeze=False, sharey="row")
        for (lost, cost), effects in zip(axes, shown, strict=True):
            for one in effects:
                if one.lost:
                    _price(lost, one, looks[one.label]["color"], *one.lost)
                if one.cost:
                    _price(cost, one, looks[one.label]["color"], one.cost, one.cost, one.cost)
            lost.set_xlabel("zero-shot top-1 lost, points")
            cost.set_xlabel("core-seconds of the filter, per million pairs")
            if not any(one.cost for one in effects):
                cost.set_axis_off()
            if costs := [one.cost for one in effects if one.cost]:
                _logarithmic(cost.xaxis, min(costs) / 1.25, max(costs) * 1.25)
            lost.set_yscale("log")
            lost.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
            lost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            lost.yaxis.set_minor_formatter(NullFormatter())
            lost.set_ylabel("protection factor")
            lost.set_title(_titled(effects[0].attack), fontsize=7, loc="left", family="monospace")
            for each in (lost, cost):
                each.axhline(1, color="#BBBBBB", lw=0.6, zorder=0)
            _names(cost if cost.axison else lost, effects, looks)
    return figure


def _price(axes: Axes, one: "Effect", colour: str, x: float, left: float, right: float) -> None:
    """A dot with its whiskers; a factor known from one side only points to the other."""
    y, found = _place(one), one.protection
    if y is None or found is None:
        return
    axes.plot([left, right], [y, y], color=colour, lw=0.6, alpha=0.5)
    low, high = (found.low if found.low > 0 else y / 1.6), (found.high if np.isfinite(found.high) else y * 1.6)
    axes.plot([x, x], [low, high], color=colour, lw=0.8, alpha=0.7)
    marker = "o" if found.known else "^" if found.most == np.inf else "v"
    axes.plot(x, y, marker, ms=5, color=colour, mec="white", mew=0.5, zorder=3)


def _names(axes: Axes, effects: Sequence["Effect"], looks: dict[str, Any]) -> None:
    """Right of both panels at the height of the dots, pushed apart where they would overlap, with a line to each."""
    low, high = np.log(axes.get_ylim())
    order = sorted(effects, key=lambda one: _place(one) or 0)
    wanted = np.array([(np.log(_place(one) or 1) - low) / (high - low) for one in order])
    apart, at = 0.07, wanted.copy()
    for _ in range(200):
        gaps = np.maximum(apart - np.diff(at), 0) / 2
        at[:-1] -= gaps
        at[1:] += gaps
    for one, y, place in zip(order, wanted, at, strict=True):
        colour = looks[one.label]["color"]
        across = axes.transAxes
        axes.plot([1.0, 1.05], [y, place], transform=across, color=colour, lw=0.5, clip_on=False)
        axes.text(1.06, place, _plain(one.label), transform=across, va="center", fontsize=7, color=colour)


def _place(one: "Effect") -> float | None:
    """Where a factor is drawn: at its bound, where it has but one."""
    if one.protection is None:
        return None
    ends = [end for end in (one.protection.least, one.protection.most) if 0 < end < np.inf]
    return ends[0] if ends else None


def _looks(effects: Sequence["Effect"]) -> dict[str, dict[str, Any]]:
    """Colour and line of each arm, the same in all panels."""
    looks: dict[str, dict[str, Any]] = {}
    rest = controls = 0
    for one in effects:
        if one.label in looks:
            continue
        if one.key.kind == UNDEFENDED:
            looks[one.label] = {"color": PLAIN, "ls": "-"}
        elif one.key.kind == "control":
            looks[one.label] = {"color": CONTROL, "ls": DASHES[controls % len(DASHES)]}
            controls += 1
        else:
            looks[one.label] = {"color": COLOURS[rest % len(COLOURS)], "ls": DASHES[rest // len(COLOURS) % len(DASHES)]}
            rest += 1
    return looks


def _titled(attack: str) -> str:
    return _plain(attack if len(attack) <= 52 else f"{attack[:51]}…")


def _plain(text: str) -> str:
    return one_line(text).replace("$", r"\$")  # names are data, not mathematics, and control characters no XML

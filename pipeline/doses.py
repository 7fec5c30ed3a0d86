"""Which doses are tried: those that were written down, or as few as find the dose at which an attack works.

`adaptive(low='0.3%', high='10%', factor=1.5)` bisects for each attack, arm and seed over one grid of doses that lie at
most `factor` apart: first the highest, then the middle of what is left, until two neighbours are known between which
success passes one half. All arms and seeds meet on the same grid, so the model that one arm's filter looks through
serves the others.

Trade-off: a bisection takes success to rise with the dose; where it does not, it ends at one of the crossings, and the
curve that is fitted afterwards shows it.
"""

import math
from dataclasses import dataclass, field

from pipeline import spec
from pipeline.errors import InputError
from pipeline.plan import Dose


@dataclass(frozen=True)
class Adaptive:
    """The doses `grid`, ascending, each as `poison --dose` takes it."""

    text: str
    grid: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Adaptive | None":
        """None of a plain dose. Raises InputError where the call is not one that can be searched."""
        if not text.strip().startswith("adaptive"):
            return None
        _, given = spec.parse_call(text)
        wrong = InputError(f"{text}: write adaptive(low='0.3%', high='10%', factor=1.5)")
        if given.keys() - {"low", "high", "factor"} or not {"low", "high"} <= given.keys():
            raise wrong
        factor = given.get("factor", 1.5)
        if not spec.fits(factor, float) or not (isinstance(given["low"], str) and isinstance(given["high"], str)):
            raise wrong
        low, high = Dose.parse(given["low"]), Dose.parse(given["high"])
        if (low.count is None) != (high.count is None):
            raise InputError(f"{text}: low and high are both numbers of pairs, or both shares")
        ends = (low.share * 1e6, high.share * 1e6) if low.count is None else (low.count, high.count or 0)
        if not 0 < ends[0] < ends[1] or not factor > 1:
            raise InputError(f"{text}: 0 < low < high, and factor above 1")
        parts = math.ceil(math.log(ends[1] / ends[0]) / math.log(factor) - 1e-9)
        doses = (ends[0] * (ends[1] / ends[0]) ** (i / parts) for i in range(parts + 1))
        if low.count is not None:
            return cls(text, tuple(dict.fromkeys(f"{round(dose)}" for dose in doses)))
        return cls(text, tuple(dict.fromkeys(f"{_four_figures(dose)}ppm" for dose in doses)))


def _four_figures(dose: float) -> str:
    """At least, and no exponent: 0.4, 67.08, 120000."""
    said = f"{dose:.{max(0, 3 - math.floor(math.log10(dose)))}f}"
    return said.rstrip("0").rstrip(".") if "." in said else said


@dataclass
class Search:
    """One attack, arm and seed: at which doses of the grid success is at least one half.

    `below` is the highest place known to be under one half, `above` the lowest known not to be.
    """

    grid: tuple[str, ...]
    below: int = -1
    above: int = field(init=False)

    def __post_init__(self) -> None:
        self.above = len(self.grid)

    def tell(self, dose: str, success: float | None) -> None:
        """What a run at a dose of the grid came to; None, where nothing was asked, is no success."""
        place = self.grid.index(dose)
        if (success or 0.0) >= 0.5:
            self.above = min(self.above, place)
        else:
            self.below = max(self.below, place)

    @property
    def next(self) -> str | None:
        """The dose to try; None when the search is over."""
        top = len(self.grid) - 1
        if self.above > top:
            return None if self.below == top else self.grid[top]
        return self.grid[(self.below + self.above) // 2] if self.above - self.below > 1 else None

    @property
    def left(self) -> int:
        """The most runs that it may still ask for."""
        top = len(self.grid) - 1
        if self.next is None:
            return 0
        first = self.above > top  # the highest dose is asked for before the middle of what is left
        return first + math.ceil(math.log2(min(self.above, top) - self.below))

    @property
    def reached(self) -> bool:
        return self.above < len(self.grid)

"""Which doses are tried."""

import itertools

import pytest

from pipeline.doses import Adaptive, Search
from pipeline.errors import InputError
from pipeline.plan import Dose

GRID = "adaptive(low='0.3%', high='10%', factor=1.5)"


def test_the_grid_reaches_from_low_to_high_in_steps_of_at_most_the_factor():
    found = Adaptive.parse(GRID)
    assert found is not None
    doses = [int(dose.removesuffix("ppm")) for dose in found.grid]
    assert doses[0] == 3_000 and doses[-1] == 100_000
    assert all(1 < b / a <= 1.5001 for a, b in itertools.pairwise(doses))
    assert Adaptive.parse("300") is Adaptive.parse("1%") is None
    numbers = Adaptive.parse("adaptive(low='1', high='4', factor=1.2)")
    assert numbers is not None and numbers.grid == ("1", "2", "3", "4")  # a pair is not divided
    close = Adaptive.parse("adaptive(low='0.1%', high='0.11%', factor=1.0005)")
    assert close is not None and close.grid == tuple(f"{ppm}ppm" for ppm in range(1000, 1101))


def test_doses_below_one_part_in_a_million_stay_apart_and_above_nothing():
    found = Adaptive.parse("adaptive(low='0.4ppm', high='100ppm', factor=1.2)")
    assert found is not None and (found.grid[0], found.grid[-1]) == ("0.4ppm", "100ppm")
    shares = [Dose.parse(dose).share for dose in found.grid]
    assert all(1.19 < b / a < 1.201 for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize(
    "text",
    [
        "adaptive",
        "adaptive(low='1%')",
        "adaptive(low='1%', high='10%', step=2)",
        "adaptive(low=1, high=10)",
        "adaptive(low='1%', high='300')",
        "adaptive(low='10%', high='1%')",
        "adaptive(low='0', high='1%')",
        "adaptive(low='1%', high='10%', factor=1)",
        "adaptive(low='1%', high='200%')",
    ],
)
def test_what_cannot_be_searched_is_said(text):
    with pytest.raises(InputError):
        Adaptive.parse(text)


def test_a_bisection_ends_between_two_neighbours_after_few_runs():
    adaptive = Adaptive.parse(GRID)
    assert adaptive is not None
    grid = adaptive.grid
    for first in range(len(grid) + 1):  # the lowest dose that works; none at all
        search, runs = Search(grid), 0
        most = search.left
        while dose := search.next:
            search.tell(dose, float(grid.index(dose) >= first))
            runs += 1
        assert (search.below, search.above) == (first - 1, first)
        assert search.reached == (first < len(grid)) and runs <= most
        assert runs == 1 or search.reached  # the highest dose fails: one run says so


def test_success_that_does_not_rise_ends_the_search_too():
    search = Search(("1", "2", "3", "4"))
    for dose, success in (("4", 1.0), ("2", 1.0), ("3", 0.0)):
        search.tell(dose, success)
    assert search.next is None

"""ED50s and protection factors on curves whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bioassay import UNKNOWN, Estimate, Trials, ed50, fit, mean_over_seeds, protection

DOSES = (3_000, 6_000, 12_000, 24_000, 48_000, 96_000)


def curve(dose, truth, slope=6.0, lower=0.0, upper=1.0):
    return lower + (1 - lower) * upper / (1 + (dose / truth) ** -slope) if dose else lower


def trials(truth, seeds=3, spread=0.0, doses=DOSES, images=1867, rng=None, **shape) -> Trials:
    """Without a generator what is expected, to the image."""
    rows = []
    for seed in range(seeds):
        own = truth * np.exp(spread * rng.standard_normal()) if rng else truth
        for dose in doses:
            p = curve(dose, own, **shape)
            rows.append((seed, dose, int(rng.binomial(images, p)) if rng else round(images * p), images))
    return Trials.of(rows)


@pytest.mark.parametrize("truth", [5_000, 20_000, 70_000])
@pytest.mark.parametrize("slope", [1.5, 4, 10])
@pytest.mark.parametrize("lower, upper", [(0.0, 1.0), (0.05, 0.9), (0.0, 0.65)])
def test_the_ed50_is_where_success_is_one_half(truth, slope, lower, upper):
    found = ed50(trials(truth, doses=(0, *DOSES), slope=slope, lower=lower, upper=upper), draws=50)
    share = (0.5 - lower) / ((1 - lower) * upper)
    expected = truth * (share / (1 - share)) ** (1 / slope)
    if found.known:
        # a jump between two doses leaves open where in the gap it is
        assert found.least == pytest.approx(expected, rel=0.03 if slope < 10 else 0.1)
        assert found.low <= found.least <= found.high
    else:  # beyond the doses
        assert expected > DOSES[-1] * 0.97 and found.least == DOSES[-1] and found.high == np.inf


def test_what_was_never_reached_is_open_upwards_and_what_always_was_downwards():
    never, always = ed50(trials(1e7)), ed50(trials(100))
    assert never == Estimate(96_000, np.inf, 96_000, np.inf) and str(never) == "≥ 96,000"
    assert always == Estimate(0, 3_000, 0, 3_000) and str(always) == "≤ 3,000"
    plateau = ed50(trials(6_000, upper=0.4))  # rises, and stays below one half
    assert plateau.most == np.inf
    one_dose = ed50(Trials.of([(seed, 96_000, 30, 100) for seed in range(3)]))
    assert (one_dose.least, one_dose.most) == (96_000, np.inf)


def test_a_protection_factor_knows_what_it_does_not_know():
    undefended = trials(10_000, spread=0.05, rng=np.random.default_rng(0))
    found = protection(trials(40_000, spread=0.05, rng=np.random.default_rng(1)), undefended)
    assert found.known and found.low <= 4 <= found.high and found.least == pytest.approx(4, rel=0.15)
    stopped = protection(trials(1e7), undefended)
    assert stopped.least == pytest.approx(96_000 / 10_000, rel=0.1) and stopped.most == stopped.high == np.inf
    assert 0 < stopped.low <= stopped.least and str(stopped).startswith("≥ 9")
    made_worse = protection(trials(100), undefended)
    assert made_worse.least == made_worse.low == 0 and made_worse.most == pytest.approx(0.3, rel=0.1)
    assert protection(trials(1e7), trials(1e7)) == UNKNOWN and str(UNKNOWN) == "not to be told"
    assert protection(trials(100), trials(1e7)).most == pytest.approx(3_000 / 96_000)  # it helps the attacker
    other_seeds = Trials.of([(9, dose, 1, 2) for dose in DOSES])
    assert protection(other_seeds, undefended) == UNKNOWN == protection(Trials.of([]), undefended)


def test_a_factor_is_never_of_the_easy_seeds_alone():
    """An arm without the hard seed would look better known than it is."""

    def of(factor, seeds):
        truths = [factor * own for own in (20e3, 24e3, 80e3)[:seeds]]
        return Trials.of([(s, d, round(100 * curve(d, t)), 100) for s, t in enumerate(truths) for d in DOSES])

    assert ed50(of(1.8, 2), draws=20).known and protection(of(1.8, 2), of(1.0, 3), draws=20) == UNKNOWN
    assert protection(of(1.8, 3), of(1.0, 3), draws=20).least == pytest.approx(1.8, rel=0.15)


def test_a_seed_that_is_never_reached_counts_at_the_doses_that_its_search_left_out():
    """Two seeds cross at 12,000; of the third the search knows after one run that it does not cross at all."""
    easy = [(s, d, round(1000 * curve(d, 12_000)), 1000) for s in (0, 1) for d in (6_000, 12_000, 24_000, 96_000)]
    found = Trials.of([*easy, (2, 96_000, 10, 1000)])
    expected = 12_000 * 3 ** (1 / 6)  # where two thirds of 3/4 are one half
    assert ed50(found, draws=50).least == pytest.approx(expected, rel=0.06)
    assert ed50(Trials.of(easy), draws=50).least == pytest.approx(12_000, rel=0.02)
    assert sorted(found.balanced.dose[found.balanced.seed == 2]) == [6_000, 12_000, 24_000, 96_000]
    assert ed50(found, draws=50).high == np.inf  # some draws are of the third seed alone
    mixed = Trials.of([*easy, (2, 96_000, 900, 1000), (2, 24_000, 10, 1000)])
    assert mixed.balanced is mixed  # it has a crossing of its own


def test_nothing_poisoned_and_nothing_asked():
    clean = Trials.of([(0, 0.0, 0, 100)])
    assert ed50(clean) == UNKNOWN and fit(clean) is None
    assert ed50(Trials.of([(0, 100.0, 0, 0)])) == UNKNOWN


def test_success_without_poison_is_not_credited_to_the_poison():
    """With the clean runs the lower end is known; the curve passes through it."""
    found = fit(trials(20_000, doses=(0, *DOSES), lower=0.2))
    assert found is not None and found.lower == pytest.approx(0.2, abs=0.005)
    assert found.at(np.array([1.0]))[0] == pytest.approx(0.2, abs=0.005)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_order_and_unit_change_nothing(seed, unit):
    rng = np.random.default_rng(seed)
    some = trials(20_000, spread=0.3, rng=rng)
    order = rng.permutation(len(some.k))
    rows = list(zip(some.seed, some.dose * unit, some.k, some.n, strict=True))
    one, two = ed50(some, draws=100), ed50(Trials.of([rows[i] for i in order]), draws=100)
    for end in ("least", "most", "low", "high"):
        assert getattr(two, end) == pytest.approx(unit * getattr(one, end), rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_curves_rise_and_more_success_needs_no_more_poison(seed):
    rng = np.random.default_rng(seed)
    some = Trials.of([(s, d, int(rng.integers(0, 101)), 100) for s in range(3) for d in (0, *DOSES)])  # any data at all
    found = fit(some)
    assert found is not None
    at = found.at(np.geomspace(1, 1e7, 50))
    assert np.isfinite(at).all() and (np.diff(at) >= -1e-12).all() and at.min() >= 0 and at.max() <= 1
    more = Trials(some.seed, some.dose, np.where(some.dose > 0, np.minimum(some.k + 20, some.n), some.k), some.n)
    assert ed50(more, draws=20).most <= ed50(some, draws=20).most * 1.02


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """The full simulation is `python -m tests.benchmarks.dose_response`; a percentile bootstrap would be far below."""
    rng = np.random.default_rng(0)
    held, rounds = 0, 60
    for _ in range(rounds):
        found = ed50(trials(20_000, spread=0.3, rng=rng), draws=200)
        held += found.low <= 20_000 <= found.high
    assert held / rounds >= 0.87


def test_dose_zero_of_a_seed_that_has_no_other_tells_nothing():
    """A loop that is not finished has dose 0 of every seed first."""
    some = trials(20_000, spread=0.1, rng=np.random.default_rng(0))
    rows = list(zip(some.seed, some.dose, some.k, some.n, strict=True))
    assert ed50(Trials.of([*rows, (3, 0.0, 200, 1867)])) == ed50(some)


def test_images_of_two_arms_are_drawn_apart_however_alike_their_counts_are():
    rows = [(seed, dose, k, 100) for seed in range(3) for dose, k in zip(DOSES, (2, 10, 45, 80, 95, 99), strict=True)]
    one = Trials.of(rows)
    moved = Trials.of([(seed, dose, k + (dose == DOSES[1]) - (dose == DOSES[4]), n) for seed, dose, k, n in rows])
    more = Trials.of([(seed, dose, k + (dose == DOSES[1]), n) for seed, dose, k, n in rows])
    widths = [np.log(found.high / found.low) for found in (protection(arm, one) for arm in (one, moved, more))]
    assert min(widths) > 0.8 * max(widths) > 0.02


def test_one_seed_is_over_images_only():
    alone, together = (mean_over_seeds(values) for values in ([[(1.0, 0.04)]], [[(1.0, 0.04)], [(3.0, 0.04)]]))
    assert alone[0] == 1.0 and alone[2] - alone[1] == pytest.approx(2 * 1.96 * 0.2, rel=0.1)
    assert together[0] == 2.0 and together[2] - together[1] > 10  # two seeds say next to nothing

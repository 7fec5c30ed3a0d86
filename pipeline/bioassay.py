"""ED50 and protection factor: how much poison it takes, and how many times more under a filter, with honest intervals.

The model is bioassay's (Finney, Probit Analysis, 3rd ed. 1971: logit over log dose; chapter 7 for the lower end, which
is Abbott's correction, 1925):

    p(dose) = c + (1 - c) * u / (1 + exp(-b * (log dose - a)))

c is the success on a model that was never poisoned, fitted where dose 0 was measured and 0 elsewhere. u is the share
that any dose reaches, fitted from four different doses on and 1 below: three points cannot tell a plateau from a slope.
ED50 is where p is one half, not the middle between the ends: an attack whose plateau is below one half has none. The
slope has a weak prior, because doses between which success jumps from none to all leave it, and the place in the gap,
undetermined. Nothing is extrapolated: an ED50 outside the doses that were tried is known to be above or below them.

The interval resamples seeds, then the images of each run (Davison & Hinkley 1997, section 3.8). Few seeds make the
percentile bootstrap too narrow (Hesterberg 2015, section 4); as three seeds leave no wider percentiles to take, each
replicate's distance from the estimate is stretched instead, by the t quantile and by sqrt(S / (S - 1)), on the log
scale. How often the interval then holds the truth: docs/dose_response.md.

Trade-off: seeds are pooled into one curve, which is flatter than each training's own; its ED50 is the dose at which the
expected success over trainings is one half. A bisection tries each seed near its own crossing only, so of seeds that
differ many times over that is an approximation. One seed gives an interval over images only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from train.metrics import Z95

DRAWS = 1000
PLATEAU_FROM = 4  # different doses
SLOPE, SPREAD = np.log(4.0), 1.5  # prior of log b, normal; a slope of 4 goes from 10% to 90% within a factor of 3
ROUNDS = 200
_END = 9.0  # the logits of c / 0.5 and u stay within
_STIFF = 1e-2  # precision of their prior: keeps them off infinity, says nothing else


@dataclass(frozen=True, eq=False)
class Trials:
    """Runs of one arm under one attack. seed int[m], dose float[m] (ppm, 0: clean), k and n int[m]: hits of images."""

    seed: np.ndarray
    dose: np.ndarray
    k: np.ndarray
    n: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, float, int, int]]) -> "Trials":
        """From (seed, dose, k, n) in any order.

        Runs without images tell nothing and are left out, and so is dose 0 of a seed that has no other: it would be in
        the estimate, and in no draw of its seeds.
        """
        asked = {seed for seed, dose, _, n in rows if dose > 0 and n > 0}
        kept = sorted(row for row in rows if row[3] > 0 and row[0] in asked)
        seed, dose, k, n = (np.array(column) for column in zip(*kept, strict=True)) if kept else (np.empty(0),) * 4
        return cls(seed.astype(np.int64), dose.astype(np.float64), k.astype(np.int64), n.astype(np.int64))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(np.unique(self.seed[self.dose > 0]).tolist())

    @property
    def doses(self) -> np.ndarray:
        """float[d], ascending, without 0."""
        return np.unique(self.dose[self.dose > 0])

    @cached_property
    def balanced(self) -> "Trials":
        """With the doses that a bisection left out of seeds that are on one side of one half wherever they were tried.

        Where the highest dose fails the lower ones do: there such a seed counts as the other seeds' mean, and as no
        more than at the next dose that it was tried at. Otherwise those doses would be of the easy seeds alone.
        """
        rate, above, more = self.k / self.n, self.dose > 0, []
        for seed in self.seeds:
            mine = above & (self.seed == seed)
            reached = set((rate[mine] >= 0.5).tolist())
            for dose in np.setdiff1d(self.doses, self.dose[mine]).tolist() if len(reached) == 1 else ():
                past = mine & ((self.dose < dose) if True in reached else (self.dose > dose))
                if not past.any():
                    continue
                next_to = np.flatnonzero(past)[np.abs(self.dose[past] - dose).argmin()]
                others, own = rate[self.dose == dose].mean(), rate[next_to]
                n = int(self.n[next_to])
                more.append((seed, dose, round((max if True in reached else min)(others, own) * n), n))
        rows = zip(self.seed.tolist(), self.dose.tolist(), self.k.tolist(), self.n.tolist(), strict=True)
        return Trials.of([*rows, *more]) if more else self


@dataclass(frozen=True)
class Curve:
    """Fitted parameters: log dose of the middle, slope, lower end c, and u, the plateau of what c leaves."""

    middle: float
    slope: float
    lower: float
    upper: float

    def at(self, dose: np.ndarray) -> np.ndarray:
        """float[d]: success at doses float[d] above 0."""
        return self.lower + (1 - self.lower) * self.upper * _sigmoid(self.slope * (np.log(dose) - self.middle))


@dataclass(frozen=True)
class Estimate:
    """Between `least` and `most` (one number unless censored), with the 95% interval; 0 and inf are open ends."""

    least: float
    most: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        """As in a table: `410 (300–560)`, `≥ 8.3 (95%: ≥ 6.1)`, `≤ 30 (95%: open)`, or `not to be told`."""
        if self.least == 0 and self.most == np.inf:
            return "not to be told"
        if self.known:
            return f"{_short(self.least)} ({_short(self.low) if self.low else 'open'}–{_short(self.high)})"
        sign, bound, end = ("≥", self.least, self.low) if self.least else ("≤", self.most, self.high)
        if end in (0, np.inf):
            return f"{sign} {_short(bound)} (95%: open)"
        return f"{sign} {_short(bound)}" + ("" if end == bound else f" (95%: {sign} {_short(end)})")


UNKNOWN = Estimate(0.0, np.inf, 0.0, np.inf)


def fit(trials: Trials) -> Curve | None:
    """The curve of greatest likelihood; None where no dose above 0 was tried."""
    if not len(trials.doses):
        return None
    theta = _point(trials.balanced)[0]
    return Curve(float(theta[0]), float(np.exp(theta[1])), *(float(end) for end in _ends(theta[None])[:, 0]))


def ed50(trials: Trials, draws: int = DRAWS) -> Estimate:
    """The dose at which success is one half, in the unit of the doses; UNKNOWN where no dose was tried."""
    if not len(trials.doses):
        return UNKNOWN
    point, replicates = _ed50s(trials.balanced, trials.seeds, draws)
    low, high = _interval(_log(point), _log(replicates), len(trials.seeds))
    lowest, highest = trials.doses[[0, -1]] * (1 - 1e-9, 1 + 1e-9)
    low, high = (low if low >= lowest else 0.0), (high if high <= highest else np.inf)
    least, most = point.tolist()
    return Estimate(least, most, least if np.isclose(low, least) else low, most if np.isclose(high, most) else high)


def protection(arm: Trials, undefended: Trials, draws: int = DRAWS) -> Estimate:
    """ED50 of the arm over that of no defense; seeds are resampled together.

    UNKNOWN where the two are not of the same seeds: which are missing may hang on how much poison they take. The
    interval is open where that of either ED50 is: beyond the doses that were tried nothing is known.
    """
    seeds = undefended.seeds
    if not seeds or arm.seeds != seeds:
        return UNKNOWN
    point, replicates = _ed50s(arm.balanced, seeds, draws, stream=1)
    against, theirs = _ed50s(undefended.balanced, seeds, draws)
    ratio = _log(point) - _log(against[::-1])
    if np.isinf(ratio).all():
        return UNKNOWN
    low, high = _interval(ratio, _log(replicates) - _log(theirs[:, ::-1]), len(seeds))
    of_arm, of_none = ed50(arm, draws), ed50(undefended, draws)
    if of_arm.low == 0 or of_none.high == np.inf:
        low = 0.0
    if of_arm.high == np.inf or of_none.low == 0:
        high = np.inf
    return Estimate(float(np.exp(ratio[0])), float(np.exp(ratio[1])), low, high)


def mean_over_seeds(values: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float, float]:
    """Mean and 95% interval of a difference: per seed a list of (value, its variance over images).

    Seeds are drawn as for an ED50, images by a normal; with one seed the interval is over images only.
    """
    means = np.array([np.mean([value for value, _ in seed]) for seed in values])
    errors = np.sqrt([sum(variance for _, variance in seed) / len(seed) ** 2 for seed in values])
    seeds, rng = len(means), np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(DRAWS, seeds))
    replicates = (means[drawn] + errors[drawn] * rng.standard_normal(drawn.shape)).mean(1)
    point = float(means.mean())
    low, high = np.quantile(point + stretch(seeds) * (replicates - point), [0.025, 0.975])
    return point, float(low), float(high)


@lru_cache(maxsize=256)
def _ed50s(trials: Trials, seeds: tuple[int, ...], draws: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The estimate [2] and its bootstrap [draws, 2], each as (least, most); seeds are drawn the same for every arm.

    Images are drawn by `stream`, another for an arm than for what it is compared with.
    """
    of_seed = [np.flatnonzero(trials.seed == seed) for seed in seeds]
    width = max(map(len, of_seed))
    place = np.zeros((len(seeds), width), np.int64)
    there = np.zeros((len(seeds), width), bool)
    for row, found in enumerate(of_seed):
        place[row, : len(found)], there[row, : len(found)] = found, True
    drawn = np.random.default_rng([len(seeds), 1]).integers(len(seeds), size=(draws, len(seeds)))
    rows, present = place[drawn].reshape(draws, -1), there[drawn].reshape(draws, -1)
    rng = np.random.default_rng([stream, 2])
    n = np.where(present, trials.n[rows], 0)
    k = rng.binomial(n, (trials.k / trials.n)[rows])
    ends = (float(trials.doses[0]), float(trials.doses[-1]))
    replicates = _fit(trials.dose[rows], k.astype(float), n.astype(float), _shape(trials))
    return _censored(_point(trials), ends)[0], _censored(replicates, ends)


def _censored(theta: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """[B, 2]: (ED50, ED50), or (0, lowest dose), or (highest dose, inf)."""
    lower, upper = _ends(theta)
    share = (0.5 - lower) / ((1 - lower) * upper)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.exp(theta[:, 0] + np.where(share < 1, np.log(share / (1 - share)), np.inf) / np.exp(theta[:, 1]))
    least = np.where(found > ends[1], ends[1], np.where(found < ends[0], 0.0, found))
    most = np.where(found > ends[1], np.inf, np.where(found < ends[0], ends[0], found))
    return np.stack([least, most], axis=1)


def _interval(point: np.ndarray, replicates: np.ndarray, seeds: int) -> tuple[float, float]:
    """95% from logs: point [2] and replicates [B, 2] as (least, most)."""
    factor, ends = stretch(seeds), []
    for side, level in ((0, 0.025), (1, 0.975)):
        if np.isinf(point[side]):
            ends.append(float(np.exp(point[side])))
            continue
        stretched = point[side] + factor * (replicates[:, side] - point[side])
        end = np.quantile(stretched, level, method="inverted_cdf")  # which takes no mean with an infinity
        ends.append(float(np.exp(end)))
    return ends[0], ends[1]


def stretch(seeds: int) -> float:
    """By how much the distances of a bootstrap's replicates from the estimate are too short."""
    from scipy.stats import t

    return float(t.ppf(0.975, seeds - 1) / Z95 * np.sqrt(seeds / (seeds - 1))) if seeds > 1 else 1.0


def _shape(trials: Trials) -> tuple[bool, bool]:
    """Whether the lower end and the plateau are fitted."""
    return bool((trials.dose == 0).any()), len(trials.doses) >= PLATEAU_FROM


def _point(trials: Trials) -> np.ndarray:
    """theta [1, 4] of what was seen."""
    return _fit(trials.dose[None], trials.k[None].astype(float), trials.n[None].astype(float), _shape(trials))


def _fit(dose: np.ndarray, k: np.ndarray, n: np.ndarray, fitted: tuple[bool, bool]) -> np.ndarray:
    """theta [B, 4] of B data sets [B, m] at once, by Fisher scoring with Levenberg's damping.

    theta is a, log b, and the logits of 2c and u; `fitted` says whether the last two are.
    """
    lower, plateau = fitted
    above = dose > 0
    log_dose = np.log(np.where(above, dose, 1.0))
    free = np.array([True, True, lower, plateau])
    used = above & (n > 0)
    theta = np.zeros((len(dose), 4))
    theta[:, 0] = (log_dose * used).sum(1) / np.maximum(used.sum(1), 1)
    theta[:, 1] = SLOPE
    theta[:, 2] = -4.0 if lower else -np.inf
    theta[:, 3] = 3.0 if plateau else np.inf
    centre = theta[:, 0].copy()
    found, left = theta.copy(), np.arange(len(theta))
    damping = np.full(len(theta), 1e-2)
    value, score, information = _likelihood(theta, log_dose, above, k, n, free, centre)
    for _ in range(ROUNDS):
        diagonal = np.einsum("bii->bi", information)[:, :, None] * np.eye(free.sum())
        step = np.linalg.solve(information + damping[:, None, None] * diagonal, score[..., None])[..., 0]
        step = np.clip(step, -1.5, 1.5)
        tried = theta.copy()
        tried[:, free] += step
        tried[:, 2:] = np.where(np.isfinite(tried[:, 2:]), np.clip(tried[:, 2:], -_END, _END), tried[:, 2:])
        there = _likelihood(tried, log_dose, above, k, n, free, centre)
        better = there[0] >= value
        going = np.where(better, (there[0] - value > 1e-9) & (np.abs(step).max(1) > 1e-6), damping < 1e6)
        damping = np.where(better, damping / 5, damping * 5)
        theta = np.where(better[:, None], tried, theta)
        found[left] = theta
        if not going.any():
            break
        value = np.where(better, there[0], value)[going]
        score = np.where(better[:, None], there[1], score)[going]
        information = np.where(better[:, None, None], there[2], information)[going]
        theta, damping, centre, left = theta[going], damping[going], centre[going], left[going]
        log_dose, above, k, n = log_dose[going], above[going], k[going], n[going]
    return found


def _likelihood(
    theta: np.ndarray,
    log_dose: np.ndarray,
    above: np.ndarray,
    k: np.ndarray,
    n: np.ndarray,
    free: np.ndarray,
    centre: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Penalised log-likelihood [B], its score [B, f] and expected information [B, f, f] in the free parameters."""
    slope = np.exp(theta[:, 1:2])
    x = log_dose - theta[:, :1]
    s = np.where(above, _sigmoid(slope * x), 0.0)
    lower, upper = (end[:, None] for end in _ends(theta))
    p = np.clip(lower + (1 - lower) * upper * s, 1e-9, 1 - 1e-9)
    ds = (1 - lower) * upper * s * (1 - s) * slope
    c_by_logit, u_by_logit = lower * (1 - 2 * lower), upper * (1 - upper)
    slopes = np.stack(
        [-ds, ds * x, c_by_logit * (1 - upper * s), (1 - lower) * s * u_by_logit * np.ones_like(p)], axis=-1
    )
    slopes = slopes[..., free]
    variance = p * (1 - p)
    value = (k * np.log(p) + (n - k) * np.log(1 - p)).sum(1)
    score = np.einsum("bm,bmf->bf", (k - n * p) / variance, slopes)
    information = np.einsum("bm,bmf,bmg->bfg", n / variance, slopes, slopes)
    prior = np.stack([centre, np.full_like(centre, SLOPE), np.full_like(centre, -4.0), np.full_like(centre, 3.0)], 1)
    precision = np.array([1e-4, 1 / SPREAD**2, _STIFF, _STIFF])[free]
    off = (theta - prior)[:, free]
    information[:, range(len(precision)), range(len(precision))] += precision
    return value - 0.5 * (precision * off**2).sum(1), score - precision * off, information


def _ends(theta: np.ndarray) -> np.ndarray:
    """[2, B]: c, at most one half, and u."""
    return np.stack([0.5 * _sigmoid(theta[:, 2]), _sigmoid(theta[:, 3])])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _log(dose: np.ndarray) -> np.ndarray:
    """Of open ends too: 0 and inf."""
    with np.errstate(divide="ignore"):
        return np.log(dose)


def _short(value: float) -> str:
    if value == np.inf:
        return "∞"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"

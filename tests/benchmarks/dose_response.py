"""How often does the 95% interval of an ED50 and of a protection factor hold the truth? The table of
docs/dose_response.md.

`python -m tests.benchmarks.dose_response [ROUNDS]`: trainings are simulated whose own log ED50 is normal around the
truth, with doses as a config writes them down or as a bisection finds them; the interval is that of
pipeline/bioassay.py, and beside it the plain percentile bootstrap that it replaces.
"""

import sys

import numpy as np

from pipeline import bioassay
from pipeline.bioassay import Trials, ed50, protection
from pipeline.doses import Adaptive, Search

TRUTH, FACTOR = 20_000.0, 2.5
FIXED = (3_000, 6_000, 12_000, 24_000, 48_000, 96_000)
GRID = "adaptive(low='0.3%', high='10%', factor=1.5)"
IMAGES, DRAWS = 1867, 500


def main(rounds: int) -> None:
    """Print a row for each design, number of seeds and spread of log ED50 between them."""
    print(
        "| doses | seeds | spread | ED50 held | percentile | times wide | factor held | runs a seed |\n"
        + "|---" * 8
        + "|"
    )
    for design in ("fixed", "bisected"):
        for seeds in (2, 3, 5):
            for spread in (0.1, 0.3):
                _row(design, seeds, spread, rounds)


def _row(design: str, seeds: int, spread: float, rounds: int) -> None:
    rng = np.random.default_rng([seeds, int(100 * spread), len(design)])
    held = plain = factor = runs = 0
    widths = []
    for _ in range(rounds):
        own = TRUTH * np.exp(spread * rng.standard_normal(seeds))
        none = _trials(design, own, rng)
        arm = _trials(design, FACTOR * own * np.exp(spread * rng.standard_normal(seeds)), rng)
        found = ed50(none, DRAWS)
        held += found.low <= TRUTH <= found.high
        widths.append(found.high / found.low if found.low else np.inf)
        times = protection(arm, none, DRAWS)
        factor += times.low <= FACTOR <= times.high
        runs += len(none.k)
        plain += _percentile(none)
    shares = [f"{100 * n / rounds:.0f}%" for n in (held, plain)]
    print(
        f"| {design} | {seeds} | {spread} | {shares[0]} | {shares[1]} | {np.median(widths):.1f} "
        f"| {100 * factor / rounds:.0f}% | {runs / rounds / seeds:.1f} |",
        flush=True,
    )


def _percentile(trials: Trials) -> bool:
    _, replicates = bioassay._ed50s(trials.balanced, trials.seeds, DRAWS)
    low = np.quantile(replicates[:, 0], 0.025, method="inverted_cdf")
    high = np.quantile(replicates[:, 1], 0.975, method="inverted_cdf")
    return bool(low <= TRUTH <= high)


def _trials(design: str, own: np.ndarray, rng: np.random.Generator) -> Trials:
    rows = []
    for seed, truth in enumerate(own):
        if design == "fixed":
            rows += [_run(seed, dose, truth, rng) for dose in FIXED]
            continue
        adaptive = Adaptive.parse(GRID)
        assert adaptive
        search = Search(adaptive.grid)
        while dose := search.next:
            rows.append(_run(seed, float(dose.removesuffix("ppm")), truth, rng))
            search.tell(dose, rows[-1][2] / IMAGES)
    return Trials.of(rows)


def _run(seed: int, dose: float, truth: float, rng: np.random.Generator) -> tuple[int, float, int, int]:
    return seed, dose, int(rng.binomial(IMAGES, 1 / (1 + (dose / truth) ** -6.0))), IMAGES


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)

"""How long an audit of metadata takes: captions, URLs, similarities and sizes of a million pairs, no images.

`python -m tests.benchmarks.audit [--rows 1000000] [--files 20] [--json FILE]` makes tables with the skew of a crawl and
audits them in a process of its own, Ray's start included. Words are of a Zipf distribution (exponent 1.05, 50,000 of
them), a caption has 4 to 24; 15% of the pairs repeat a caption, the commonest ones most; 3% fill in a template; 60,000
domains are Zipf's too. A second run, which only looks again at columns that are there, is timed beside it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl

DOMAINS, VOCABULARY = 60_000, 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "metadata"
        tables.mkdir()
        for number in range(options.files):
            make(number, options.rows // options.files).write_parquet(tables / f"{number:05d}.parquet")
        size = sum(file.stat().st_size for file in tables.iterdir())
        command = [sys.executable, "-m", "pipeline.cli", "audit", str(tables), f"{folder}/out"]
        seconds, load = [], os.getloadavg()[0]
        for _ in range(2):
            clock = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(round(time.perf_counter() - clock, 1))
        found = json.loads(Path(folder, "out", "audit.json").read_bytes())
        written = Path(folder, "out", "audit.json").stat().st_size
    result = {
        "rows": found["dataset"]["pairs"],
        "files": options.files,
        "input_mb": round(size / 1e6, 1),
        "seconds": seconds[0],
        "again_seconds": seconds[1],
        "load_before": round(load, 1),  # of other work on the machine; on two cores it should be near 0
        "rows_per_second": round(found["dataset"]["pairs"] / seconds[0]),
        "peak_mb_of_the_driver": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "audit_json_kb": round(written / 1024),
        "findings": [f"{one['severity']} {one['audit']}-{one['kind']} {one['n']}" for one in found["findings"]],
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def make(number: int, rows: int) -> pl.DataFrame:
    """A table of LAION's columns."""
    rng = np.random.default_rng(number)
    shared = np.random.default_rng(10**6)
    length = np.clip(rng.lognormal(2.1, 0.5, rows).astype(int), 4, 24)
    words = _words()[_zipf(rng, VOCABULARY, int(length.sum()))].tolist()
    ends = np.cumsum(length).tolist()
    captions = np.asarray([" ".join(words[end - n : end]) for end, n in zip(ends, length, strict=True)], object)
    common = [" ".join(_words()[_zipf(shared, VOCABULARY, 6)]) for _ in range(20_000)]
    repeated = rng.random(rows) < 0.15
    captions[repeated] = np.asarray(common, object)[_zipf(rng, len(common), int(repeated.sum()))]
    filled = np.flatnonzero(rng.random(rows) < 0.03)
    captions[filled] = [
        f"buy the best {word} online at our shop" for word in _words()[_zipf(rng, VOCABULARY, len(filled))]
    ]
    return pl.DataFrame(
        {
            "URL": [
                f"https://cdn{d % 7}.site{d}.com/{number}/{i}.jpg" for i, d in enumerate(_zipf(rng, DOMAINS, rows))
            ],
            "TEXT": captions.tolist(),
            "WIDTH": np.clip(rng.lognormal(6.2, 0.6, rows), 1, 30_000).astype(np.int32),
            "HEIGHT": np.clip(rng.lognormal(6.1, 0.6, rows), 1, 30_000).astype(np.int32),
            "similarity": np.maximum(rng.normal(0.33, 0.03, rows), 0.3),
        }
    )


@cache
def _words() -> np.ndarray:
    """Syllables of letters, as caption words are."""
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeio"]
    return np.asarray([syllables[i % 64] + syllables[i // 64 % 64] + syllables[i // 4096] for i in range(VOCABULARY)])


def _zipf(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """int64[size] below n, i with a weight of 1 / (i + 1)^1.05."""
    weight = np.cumsum(1 / np.arange(1, n + 1) ** 1.05)
    return np.searchsorted(weight, rng.random(size) * weight[-1])


if __name__ == "__main__":
    main()

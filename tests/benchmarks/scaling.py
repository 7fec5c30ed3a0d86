"""What a pair costs at every stage, how that scales over workers, and what 400M and 5.85B pairs would take.

    python -m tests.benchmarks.scaling [--shards 8] [--folder DIR] [--json]

Shards of 9,000 pairs of 39 kB as img2dataset leaves them, with random embeddings of 512. Each stage is the job itself,
in a process of its own with 1 and with 2 Ray workers; start-up is left out. The plan is arithmetic on these figures:
core-hours are CPU seconds of the workers; wall time on a cluster is what bounds it most, cores, the driver (the figure
of `tests.benchmarks.driver`) or the store. Embedding and training are not in it: they are the model's own cost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.embed import _write as write_embeddings
from pipeline.embed import embeddings_path
from pipeline.filter import filter_shards
from pipeline.poison import poison
from pipeline.score import score
from pipeline.shard_map import Job, shard_map
from pipeline.shards import list_shards, uids
from pipeline.verify import verify
from tests.benchmarks.density import images
from tests.benchmarks.rewrite import _nothing, make, say

DRIVER_MS = 1.46  # of CPU a shard, docs/results/shards.md
PAIRS_A_SHARD = 10_000
CORES, STORE = 1000, 10e9  # of the cluster of the plan; bytes a second, read and written
BATCH = ("clip_score", *(f"{name}(k=16, reference='batch')" for name in ("kdist", "lid", "slof", "dao")))
POOL = ("slof", "image_neighbours", "caption_neighbours")
SIZES = {"LAION-400M": 400e6, "LAION-5B": 5.85e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers:
        print(json.dumps(measure(Path(arguments.folder), arguments.workers)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        prepare(Path(folder), arguments.shards)
        runs = {workers: _in_a_process(folder, workers) for workers in (1, 2)}
    found = plan(runs[1], runs[2])
    if arguments.json:
        print(json.dumps(found))


def prepare(folder: Path, shards: int) -> None:
    (folder / "in").mkdir()
    (folder / "embeddings").mkdir()
    make(folder / "in", shards)
    for number, shard in enumerate(list_shards(str(folder / "in"))):
        who = uids(shard)
        rows = [images(len(who), 2 * number + i).astype(np.float16) for i in range(2)]
        write_embeddings(embeddings_path(str(folder / "embeddings"), shard.name), who, *rows, "benchmark")


def measure(folder: Path, workers: int) -> dict[str, dict[str, float]]:
    """By stage: wall seconds, the workers' CPU seconds, pairs, and bytes that they wrote, all of the stage."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    source, here = str(folder / "in"), folder / f"workers-{workers}"
    embeddings = str(folder / "embeddings")
    listed = list_shards(source)
    shard_map(Job("warm up", {}, str(here / "nothing")), listed[: 2 * workers], _nothing)
    stages: dict[str, Callable[[str], object]] = {
        "poison": lambda out: poison(source, out, attack="patch(target='banana')", dose="100ppm"),
        "score, references in the batch": lambda out: score(source, out, detector=BATCH, embeddings=embeddings),
        "score, pool of 16,384": lambda out: score(source, out, detector=POOL, embeddings=embeddings),
        "filter": lambda out: filter_shards(
            source, out, scores=(str(here / "1"),), policy="budget(detector='clip_score', drop=0.1)"
        ),
        "verify": lambda _: verify(str(here / "3" / "kept")),
    }
    found = {}
    for number, (name, run) in enumerate(stages.items()):
        out, clock = here / str(number), time.perf_counter()
        run(str(out))
        seconds = time.perf_counter() - clock
        markers = [json.loads(path.read_text()) for path in sorted(out.glob("*.stats.json"))]
        found[name] = {
            "seconds": seconds,
            "cpu": sum(m["seconds"]["cpu"] for m in markers) or seconds * workers,
            "pairs": float(sum(len(uids(shard)) for shard in listed)),
            "written": float(sum(f.stat().st_size for f in out.rglob("*") if f.is_file())) if out.exists() else 0.0,
        }
    return found


def plan(one: dict[str, dict[str, float]], two: dict[str, dict[str, float]]) -> dict[str, float]:
    """Print the tables; returns the figures."""
    say("| stage | core-µs a pair | bytes written a pair | 2 workers against 1 |\n|---|---|---|---|")
    found = {}
    for name, cost in one.items():
        micro, written = 1e6 * cost["cpu"] / cost["pairs"], cost["written"] / cost["pairs"]
        scaling = cost["seconds"] / two[name]["seconds"]
        say(f"| {name} | {micro:,.0f} | {written:,.0f} | {scaling:.2f} |")
        key = name.replace(",", "").replace(" ", "_")
        found |= {f"{key}_us": round(micro, 1), f"{key}_scaling": round(scaling, 2)}
    say("\n| dataset | stage | core-hours | on the cluster | bounded by |\n|---|---|---|---|---|")
    for dataset, pairs in SIZES.items():
        for name, cost in one.items():
            cpu, written = cost["cpu"] / cost["pairs"] * pairs, cost["written"] / cost["pairs"] * pairs
            read = 39_000 * pairs  # score reads the shards too, for their digests
            takes = {
                "cores": cpu / CORES,
                "the driver": DRIVER_MS / 1e3 * pairs / PAIRS_A_SHARD,
                "the store": (read + written) / STORE,
            }
            bound = max(takes, key=lambda key: takes[key])
            say(f"| {dataset} | {name} | {cpu / 3600:,.0f} | {takes[bound] / 3600:.1f} h | {bound} |")
    return found


def _in_a_process(folder: str, workers: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", "--folder", folder, "--workers", str(workers)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, dict[str, float]] = json.loads(out.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()

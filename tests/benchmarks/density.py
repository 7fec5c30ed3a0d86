"""How near are the density detectors to what the machine can do?

    python -m tests.benchmarks.density [--json] [--rows 300000] [--folder DIR]

The limit is the matrix product alone: 2 * 2048 * 512 operations a row, at the best rate of numpy's and of torch's
product on this machine, a thread in a process on each core or all threads in one, before and after the job; the best of
all counts. `of_gemm_cpu` is the same in core-seconds on one thread, for when the machine is not idle. The job is what
`mithridate score` does with the embeddings that `mithridate embed` wrote (fp16 parquet, in the page cache), without
reading the images: read, join, k-distance, LID, SLOF and DAO with in-batch references of 2048 and k = 16, write the
scores. Ray has started. The pool is of 100k rows: k-distance, against the product alone. With `--lists N` also a pool
of N rows by inverted lists, against the same search without them.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters._batch import Batch, Drawn
from filters._knn import neighbours
from pipeline import spec
from pipeline.embed import _write as write_embeddings
from pipeline.embed import embeddings_path
from pipeline.inputs import Inputs
from pipeline.score import _write as write_scores
from pipeline.shard_map import Job, each, shard_map
from pipeline.shards import Counts, Shard
from tests.benchmarks.rewrite import peak, say

DIMENSIONS, SIZE, K = 512, 2048, 16
SHARD = 10_000  # rows
POOL, QUERIES = 100_000, 8192
ROUNDS = 2
DETECTORS = tuple(f"{name}(k={K}, reference='batch', size={SIZE})" for name in ("kdist", "lid", "slof", "dao"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--lists", type=int, default=0, help="rows of a pool that is searched by lists; 12 KB each")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), arguments.rows)
    if arguments.lists:
        found |= by_lists(arguments.lists)
    if arguments.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def measure(folder: Path, rows: int) -> dict[str, float]:
    shards = [make(folder, number, min(SHARD, rows - start)) for number, start in enumerate(range(0, rows, SHARD))]
    cores = os.cpu_count() or 1
    work = _Density(str(folder), DETECTORS)
    shard_map(Job("density", {"": "warm up"}, str(folder / "warm")), shards[: 2 * cores], work)
    rates = [in_batch_gemm(cores)]
    clock = time.perf_counter()
    markers = shard_map(Job("density", {}, str(folder / "out")), shards, work)
    seconds = time.perf_counter() - clock
    rates.append(in_batch_gemm(cores))
    limit = max(rates) / (2 * SIZE * DIMENSIONS)
    say(f"product alone: {limit:,.0f} rows/s, {max(rates) / 1e9:.0f} GFLOPS (before {rates[0] / 1e9:.0f})")
    say(f"parquet in, four scores out: {rows / seconds:,.0f} rows/s; 3M rows in {3e6 * seconds / rows:.0f} s")
    for name in ("read", *DETECTORS, "write"):
        say(f"  {name:<40}{1e6 * sum(m['seconds'][name] for m in markers) / rows:7.1f} core-µs a row")
    workers = {m["facts"]["pid"]: m["facts"]["peak_mb"] for m in markers}  # the last of each is its highest
    return {
        "rows_per_s": rows / seconds,
        "limit_rows_per_s": limit,
        "of_gemm_limit": rows / seconds / limit,
        "of_gemm_cpu": core_seconds() * rows / sum(m["seconds"]["cpu"] for m in markers),
        "peak_mb": sum(workers.values()) + peak(),
        **against_pool(folder, cores),
    }


def core_seconds() -> float:
    """Of one row's product, on one thread: what other work on the machine disturbs least."""
    product = _Gemm(SIZE, SIZE, 8, "numpy")
    return min(d.cpu / d.operations for d in (product(None) for _ in range(5))) * 2 * SIZE * DIMENSIONS


def in_batch_gemm(cores: int) -> float:
    """Operations a second of products of a block with another, the best of several ways."""
    return max(*(on_each_core(cores, _Gemm(SIZE, SIZE, 24, by)) for by in ("numpy", "torch")), on_all_threads())


def on_each_core(cores: int, work: Callable[..., "_Done"], *shared: object) -> float:
    """Operations a second, all cores together; the best round."""
    rounds = [
        [done for _, done in each("rate", [Shard(str(i)) for i in range(cores)], work, *shared)] for _ in range(ROUNDS)
    ]
    return max(sum(d.operations for d in done) / max(d.seconds for d in done) for done in rounds)


def on_all_threads() -> float:
    done = [_Gemm(SIZE, SIZE, 24, by)(None) for by in ("numpy", "torch") for _ in range(ROUNDS)]
    return max(d.operations / d.seconds for d in done)


def against_pool(folder: Path, cores: int) -> dict[str, float]:
    pool = Batch(np.asarray([f"pool{i}" for i in range(POOL)], object), image_embedding=images(POOL, 10**6))
    queries = _queries(QUERIES)
    product = max(
        on_each_core(cores, _Gemm(SIZE, 4096, QUERIES * POOL // (SIZE * 4096), by)) for by in ("numpy", "torch")
    )
    search = on_each_core(cores, _against_pool, queries, pool)
    say(f"pool of {POOL:,}: {search / 1e9:.0f} GFLOPS of {product / 1e9:.0f} for the product alone")
    return {"pool_of_gemm": search / product, "pool_rows_per_s": search / (2 * POOL * DIMENSIONS)}


def by_lists(rows: int) -> dict[str, float]:
    """On one core: what lists cost to make, and what they save and miss."""
    name, pool_images = "image_embedding", images(rows, 10**6)
    pool = Batch(np.asarray([f"pool{i}" for i in range(rows)], object), image_embedding=pool_images)
    clock = time.perf_counter()
    exact = neighbours(_queries(2 * QUERIES).take(np.arange(QUERIES // 8)), pool, name, K)[0]
    a_row = 8 * (time.perf_counter() - clock) / QUERIES
    found = {}
    for probes in (8, 32, 128):
        there, queries = replace(pool, drawn=Drawn("benchmark", probes)), _queries(2 * QUERIES)
        clock = time.perf_counter()
        neighbours(_queries(1), there, name, K)
        made = time.perf_counter() - clock
        clock = time.perf_counter()
        distance = neighbours(queries, there, name, K)[0]
        times = a_row * len(queries) / (time.perf_counter() - clock)
        recall = float((distance[: len(exact)] <= exact[:, -1:] * (1 + 1e-5)).mean())
        say(
            f"pool of {rows:,}, {probes} probes: {times:.1f} times as fast as without lists, {recall:.1%} of the "
            f"nearest {K} found; the lists took {made:.0f} s, what {made / a_row:,.0f} rows take without"
        )
        found |= {f"times_exact_{probes}_probes": times, f"recall_{probes}_probes": recall}
    return found


def _queries(n: int) -> Batch:
    return Batch(np.asarray([f"{i}" for i in range(n)], object), image_embedding=images(n, 10**6 + 1))


@dataclass(frozen=True)
class _Done:
    read: int
    operations: float
    seconds: float
    cpu: float


@dataclass(frozen=True)
class _Gemm:
    rows: int
    columns: int
    times: int
    by: str

    def __call__(self, shard: Shard | None) -> _Done:
        import torch

        x, y = images(self.rows, 1), images(self.columns, 2)
        out = np.empty((self.rows, self.columns), np.float32)
        there = [torch.from_numpy(a) for a in (x, y.T, out)]
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.times):
            if self.by == "numpy":
                np.matmul(x, y.T, out=out)
            else:
                torch.mm(there[0], there[1], out=there[2])
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        return _Done(0, 2.0 * self.times * self.rows * self.columns * DIMENSIONS, seconds, cpu)


def _against_pool(shard: Shard, queries: Batch, pool: Batch) -> _Done:
    clock, cpu = time.perf_counter(), time.process_time()
    spec.parse("detectors", f"kdist(k={K})").score(queries, pool)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return _Done(len(queries), 2.0 * len(queries) * len(pool) * DIMENSIONS, seconds, cpu)


@dataclass(frozen=True)
class _Density:
    """What `pipeline.score` does with a shard, less reading the shard itself for its uids."""

    embeddings: str
    detectors: tuple[str, ...]

    def __call__(self, shard: Shard, out: str) -> Counts:
        clock = time.perf_counter()
        entries = {text: spec.parse("detectors", text) for text in self.detectors}
        who = pq.read_table(shard.path).column("uid").to_pylist()
        batch, _ = Inputs(self.embeddings, "", "", "key").batch(shard, who, {"image_embedding"})
        counts = Counts(read=len(batch), out=len(batch), output=f"{shard.name}.scores.parquet", input_sha256="-")
        counts.seconds["read"] = time.perf_counter() - clock
        columns = {}
        for text, entry in entries.items():
            clock = time.perf_counter()
            columns[text] = np.asarray(entry.score(batch, None), np.float32)
            counts.seconds[text] = time.perf_counter() - clock
        clock = time.perf_counter()
        write_scores(f"{out}/{counts.output}", batch.uid, columns, {})
        counts.seconds["write"] = time.perf_counter() - clock
        counts.facts = {"pid": os.getpid(), "peak_mb": peak()}
        return counts


def make(folder: Path, number: int, rows: int) -> Shard:
    """A sidecar as `embed` leaves it, and for the shard a file that holds nothing but its uids."""
    who = [f"{number:016x}{i:016x}" for i in range(rows)]
    values = [images(rows, 2 * number + i).astype(np.float16) for i in range(2)]
    write_embeddings(embeddings_path(str(folder), f"{number:08d}"), who, *values, "benchmark")
    shard = Shard(str(folder / f"{number:08d}.parquet"))
    pq.write_table(pa.table({"uid": who}), shard.path)
    return shard


def images(rows: int, seed: int) -> np.ndarray:
    """Clusters of few intrinsic dimensions in a cone, as embeddings are."""
    common, rng = np.random.default_rng(0), np.random.default_rng(seed + 1)
    cone, centre = common.normal(size=DIMENSIONS), common.normal(size=(200, DIMENSIONS))
    spread = common.normal(size=(24, DIMENSIONS)) / 24**0.5
    latent = rng.normal(size=(rows, 24)).astype(np.float32) @ spread.astype(np.float32)
    noise = 0.3 * rng.standard_normal((rows, DIMENSIONS), np.float32)
    return (cone + centre[rng.integers(200, size=rows)] + latent + noise).astype(np.float32)


if __name__ == "__main__":
    main()

"""What a shard costs the driver: memory and time, at many tiny shards.

    python -m tests.benchmarks.driver [--shards 50000] [--folder DIR] [--json]

The limits that were set: 1 GB, and 2 ms of the driver's own CPU a shard. Both are linear in shards, so those of
LAION-5B (585,000) follow by a rule of three; wall time there is the workers', not the driver's.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.dataset import Row, describe
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Sample, Shard, list_shards, rewrite
from tests.benchmarks.rewrite import memory, peak, say

LAION_5B = 585_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=50_000)
    parser.add_argument("--folder", help="where to work; default: in memory")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder or memory(30_000 * arguments.shards)) as folder:
        found = measure(Path(folder), arguments.shards)
    if arguments.json:
        print(json.dumps(found))


def measure(folder: Path, n: int) -> dict[str, float]:
    source = folder / "in"
    source.mkdir()
    # in a process of its own: webdataset brings torch, half a gigabyte that is none of the driver's
    code = f"import tests.benchmarks.rewrite as r, pathlib; r.make(pathlib.Path({str(source)!r}), 1, 2, 200)"
    subprocess.run([sys.executable, "-c", code], check=True)
    first = source / "00000000.tar"
    for i in range(1, n):
        shutil.copyfile(first, source / f"{i:08d}.tar")
    shard_map(Job("warm up", {}, str(folder / "nothing")), list_shards(str(source))[:1], _halve)  # Ray starts here
    before = peak()
    found: dict[str, float] = {}
    for name in ("first", "resume"):
        clock, cpu = time.perf_counter(), time.process_time()
        shards = list_shards(str(source))
        job = Job("driver", {}, str(folder / "out"))
        markers = shard_map(job, shards, _halve)
        rows = [Row(m["output"], m["out"], m["output_bytes"], m["output_sha256"]) for m in markers]
        describe(str(folder / "out"), rows, {"about": ""})
        found[f"{name}_cpu_ms"] = 1e3 * (time.process_time() - cpu) / n
        found[f"{name}_wall_ms"] = 1e3 * (time.perf_counter() - clock) / n
    found["peak_mb"], found["kb_a_shard"] = peak(), 1e3 * (peak() - before) / n
    say(
        f"{n:,} shards: {found['first_cpu_ms']:.2f} ms of the driver a shard, {found['resume_cpu_ms']:.2f} ms to resume"
    )
    hours, gigabytes = LAION_5B * found["first_cpu_ms"] / 3.6e6, (before + LAION_5B * found["kb_a_shard"] / 1e3) / 1e3
    say(f"  peak {found['peak_mb']:.0f} MB, {before:.0f} of them before the first shard")
    say(f"  so at {LAION_5B:,} shards: {gigabytes:.1f} GB, {hours:.2f} h of the driver's CPU")
    return {name: round(value, 3) for name, value in found.items()}


def _halve(shard: Shard, out: str) -> Counts:
    return rewrite(shard, out, _first_only)


def _first_only(sample: Sample) -> Sample | None:
    return sample if sample.key.endswith("0") else None


if __name__ == "__main__":
    main()

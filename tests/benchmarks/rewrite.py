"""How near is the shard rewriter to what the machine can do, and how far from what others do?

    python -m tests.benchmarks.rewrite [--json] [--gigabytes 3] [--folder DIR] [--datacomp CLONE]

The limit of a rewrite on one core: every kept byte copied once (at the speed of `cp`), every written byte hashed once
(at OpenSSL's speed over memory), the headers scanned once (at the speed of our scan alone). Warm figures are on one
core, in memory (/dev/shm) so that no disk blurs them, the best of alternating rounds, since other work on the machine
only ever adds. Cold ones are of the job on all cores and on the disk, against `cp` and `sync`: medians. The shards are
written by webdataset's own TarWriter.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import spec
from pipeline.attacks._corpus import Corpus
from pipeline.draw import generator
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Sample, Shard, intact, list_shards, manifest, rewrite
from pipeline.shards.reading import Mapping
from pipeline.shards.scan import records
from tests.benchmarks import datacomp

SAMPLES = 9_000  # a shard: about 300 MB
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--datacomp", help="a clone of mlfoundations/datacomp; default: cloned at run time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), arguments.gigabytes, arguments.datacomp)
    if arguments.json:
        print(json.dumps(found))


def measure(folder: Path, gigabytes: float, clone: str | None) -> dict[str, float | None]:
    source, out = folder / "in", folder / "out"
    for path in (source, out):
        path.mkdir()
    make(source, max(2, round(gigabytes * 1e9 / (SAMPLES * 36_000))))
    shards = list_shards(str(source))
    total = sum(Path(s.path).stat().st_size for s in shards)
    say(f"{len(shards)} shards, {total / 1e9:.2f} GB, {total / len(shards) / SAMPLES:,.0f} bytes a sample")
    with tempfile.TemporaryDirectory(dir=memory(total / len(shards))) as memory_folder:
        shard = Shard(shutil.copy(shards[0].path, memory_folder))
        (there := Path(memory_folder) / "out").mkdir()
        found = warm(shard, there)
        found |= against_webdataset(shard, there, found["drop_samples_s"])
    found |= cold(shards, out)
    found |= datacomp.resharder(shards, folder, clone, found["job_samples_s"])
    found["worker_peak_mb"] = worker_peak(folder)
    return {name: value if value is None else round(value, 3) for name, value in found.items()}


def warm(shard: Shard, out: Path) -> dict[str, float]:
    """One core, caches warm: rewriting and verifying against their limits."""
    size = Path(shard.path).stat().st_size
    known, block = manifest(shard), os.urandom(2**20)
    keep_all, patch, corpus = (
        list(known.uids),
        spec.parse("attacks", "patch(target='banana', size=40)"),
        Corpus({"banana": ("a banana",)}),
    )
    poisoned = set(keep_all[::1000])

    def poison(sample: Sample) -> Sample:
        return patch.poison(sample, generator(0, "b", sample.uid), corpus) if sample.uid in poisoned else sample

    work: dict[str, Callable[[], object]] = {
        "sha256": lambda: [hashlib.sha256(block).digest() for _ in range(size // 2**20)],
        "cp": lambda: subprocess.run(["cp", shard.path, str(out / "cp")], check=True),
        "scan": lambda: sum(1 for _ in records(shard.path, Mapping(shard.path))),
        "drop": lambda: rewrite(shard, str(out), drops_a_tenth),
        "poison": lambda: rewrite(shard, str(out), poison),
        "verify": lambda: intact(shard, known),
        "openssl dgst": lambda: subprocess.run(["openssl", "dgst", "-sha256", shard.path], check=True, stdout=-3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            for leftover in out.iterdir():
                leftover.unlink()
            clock = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - clock)
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        say(f"  {name:<13}{value:7.3f} s   {size / value / 1e9:5.2f} GB/s   {SAMPLES / value:9,.0f} samples/s")
    limit = 0.9 * best["cp"] + 0.9 * best["sha256"] + best["scan"]
    return {
        "of_limit": limit / best["drop"],
        "verify_of_sha256": best["sha256"] / best["verify"],
        "verify_of_openssl_dgst": best["openssl dgst"] / best["verify"],
        "poison_of_drop": best["drop"] / best["poison"],
        "drop_samples_s": SAMPLES / best["drop"],
        "verify_gb_s": size / best["verify"] / 1e9,
    }


def against_webdataset(shard: Shard, out: Path, one_core: float) -> dict[str, float]:
    """The loop that everybody writes: WebDataset → TarWriter, one process; no hash, no manifest, no fsync.

    Ours runs as the job that it is, on all cores, over links to the shard: so many that Ray's pace shows.
    """
    import webdataset as wds

    links = out / "links"
    links.mkdir()
    for i in range(4 * (os.cpu_count() or 1)):
        os.link(shard.path, links / f"{i:08d}.tar")
    theirs, ours = [], []
    for i in range(ROUNDS):
        clock = time.perf_counter()
        with wds.TarWriter(str(out / "webdataset.tar")) as writer:
            for sample in wds.WebDataset(shard.path, shardshuffle=False):
                if not tenth(sample["__key__"]):
                    writer.write({k: v for k, v in sample.items() if k == "__key__" or not k.startswith("_")})
        theirs.append(time.perf_counter() - clock)
        (out / "webdataset.tar").unlink()
        clock = time.perf_counter()
        markers = shard_map(Job("drop", {}, str(out / f"job-{i}")), list_shards(str(links)), _drop)
        ours.append((time.perf_counter() - clock) / len(markers))
        shutil.rmtree(out / f"job-{i}")
    loop, job = (
        SAMPLES / min(theirs),
        SAMPLES / min(ours[1:]),
    )  # Ray starts in the first, and memory is new to the machine
    say(f"  webdataset → TarWriter, one process: {loop:,.0f} samples/s; our job, all cores: {job:,.0f} samples/s")
    speeds = {"webdataset_samples_s": loop, "warm_job_samples_s": job}
    return {"times_webdataset": job / loop, "times_webdataset_one_core": one_core / loop, **speeds}


def cold(shards: list[Shard], out: Path) -> dict[str, float]:
    """All cores, through the job runner, caches dropped: against `cp` of the same files, both until it is on disk."""
    seconds: dict[str, list[float]] = {"cp": [], "job": []}
    shard_map(Job("warm up", {}, str(out / "nothing")), shards[:1], _nothing)  # Ray starts here
    for i in range(3):
        for name in seconds:
            target = out / f"{name}-{i}"
            target.mkdir()
            drop_caches(shards)
            clock = time.perf_counter()
            if name == "cp":
                subprocess.run(["cp", *(s.path for s in shards), str(target)], check=True)
                subprocess.run(["sync", *map(str, target.iterdir())], check=True)
            else:
                shard_map(Job("drop", {"round": i}, str(target)), shards, _drop)
            seconds[name].append(time.perf_counter() - clock)
            shutil.rmtree(target)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    samples = SAMPLES * len(shards)
    for name, value in median.items():
        say(f"  cold {name:<8}{value:7.2f} s   {samples / value:9,.0f} samples/s on all cores, until it is on disk")
    return {"of_cp_cold": median["cp"] / median["job"], "job_samples_s": samples / median["job"]}


def worker_peak(folder: Path) -> float:
    """Peak resident memory, in MB, of a Ray worker that drops a tenth of a shard of 1 GB: interpreter and all."""
    big = folder / "big"
    big.mkdir()
    make(big, 1, 27_000)
    (shard,) = list_shards(str(big))
    (marker,) = shard_map(Job("peak", {}, str(folder / "peak")), [shard], _drop_and_weigh)
    size, megabytes = Path(shard.path).stat().st_size, marker["facts"]["peak_mb"]
    say(f"  peak memory of a worker that drops a tenth of a shard of {size / 1e9:.2f} GB: {megabytes:.0f} MB")
    return float(megabytes)


def _drop_and_weigh(shard: Shard, out: str) -> Counts:
    counts = rewrite(shard, out, drops_a_tenth)
    counts.facts["peak_mb"] = peak()
    return counts


def peak() -> float:
    """Peak resident memory of this process in MB; not getrusage's, which begins with that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def memory(shard_bytes: float) -> str | None:
    """/dev/shm where it holds the shard and what is made of it, else the default temporary folder."""
    there = Path("/dev/shm")
    return str(there) if there.exists() and shutil.disk_usage(there).free > 24 * shard_bytes else None


def tenth(key: str) -> bool:
    return hashlib.md5(key.encode(), usedforsecurity=False).digest()[0] < 26


def drops_a_tenth(sample: Sample) -> Sample | None:
    return None if tenth(sample.key) else sample


def _drop(shard: Shard, out: str) -> Counts:
    return rewrite(shard, out, drops_a_tenth)


def _nothing(shard: Shard, out: str) -> Counts:
    return Counts(input_sha256="-")


def make(folder: Path, shards: int, samples: int = SAMPLES, side: int = 256) -> None:
    """Shards as img2dataset leaves them: 256-pixel JPEGs of about 30 kB, a caption, a json with a uid."""
    import webdataset as wds

    rng = np.random.default_rng(0)
    pictures = [picture(rng, side, side) for _ in range(64)]
    for i in range(shards):
        with wds.TarWriter(str(folder / f"{i:08d}.tar")) as writer:
            for j in range(samples):
                key = f"{i:05d}{j:05d}"
                image = pictures[j % 64] + rng.bytes(int(rng.integers(0, 4_000)))  # behind the end marker
                caption = f"a photo of something that was found on the web, number {j}"
                facts = {"uid": hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), "caption": caption}
                facts |= {"url": f"https://example.org/{key}.jpg", "key": key, "status": "success", "width": 256}
                facts |= {
                    "height": 256,
                    "original_width": 800,
                    "original_height": 600,
                    "sha256": "0" * 64,
                    "exif": "{}",
                }
                writer.write({"__key__": key, "jpg": image, "txt": caption, "json": json.dumps(facts, indent=4)})


def picture(rng: np.random.Generator, wide: int, high: int) -> bytes:
    """A JPEG of about half a byte a pixel."""
    small = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).resize((wide, high), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 9, (high, wide, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def drop_caches(shards: list[Shard]) -> None:
    subprocess.run(["sync"], check=True)
    for shard in shards:
        with Path(shard.path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

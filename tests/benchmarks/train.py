"""How near is `train` to the model's bare step, how far from open_clip's trainer, and what do workers and memory do?

    python -m tests.benchmarks.train [--json] [--rows 4096] [--epochs 3] [--recipe demo] [--part ours] [--folder DIR]

The limits, each measured in the same run, on tars of 256-pixel JPEGs:

`of_bare_step` (goal 0.95): pairs/s of whole epochs, loader, augmentation and traces included, to those of steps of the
same towers, loss and optimiser on one synthetic batch that lies in memory, normalised; bare steps and epochs take turns
in one process. What is written between epochs is not in it; `of_bare_step_decoding` is the same with a window that is
too small for the pixels, so that every epoch decodes.
`two_workers` (goal 0.85): pairs/s of two gloo workers of one thread each to those of one worker with two threads, which
take turns. One core-second of a worker is as good as one of a thread, so the limit is 1.
`times_open_clip` (goal 1.0): the same model, pairs, batch, epochs and precision with open_clip_train. Pairs over
seconds of all epochs, what warms up in the first included on both sides; ours begin before the shards are read for the
index, theirs before its first batch.
`…_steps` is of the median step alone. Augmentation is each one's own: a random crop there, shift and gain here.
`growth_mb`: peak memory of a worker on 20 windows of pixels less that on one, whose bound is the index of the larger.

`…_cpu` are the same in core-seconds, for when the machine is not idle; start-up and index are not in them.
"""

import argparse
import dataclasses
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import open_clip_train
from tests.benchmarks.rewrite import peak, picture, say
from train import data, launch, losses, model, recipes, trainer
from train.defenses import Defense
from train.towers import kernels

SHARDS = 20
BARE = 6  # bare steps before each epoch, of which the first is not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--part", choices=("all", "ours", "workers"), default="all", help="ours: no open_clip_train")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(**json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), arguments.recipe, arguments.rows, arguments.epochs, arguments.part)
    if arguments.json:
        print(json.dumps({name: value if value is None else round(value, 4) for name, value in found.items()}))


def measure(folder: Path, recipe: str, rows: int, epochs: int, part: str) -> dict[str, float | None]:
    shards = make(folder / "in", rows)
    cores = len(os.sched_getaffinity(0))
    common = {"shards": shards, "recipe": recipe, "epochs": epochs}
    window = rows * recipes.recipe_of(recipe).image_size ** 2 * 3

    def ours(name: str, **options: Any) -> dict[str, float]:
        return _in_a_process(common | {"out": str(folder / name), "threads": cores} | options)

    def workers() -> dict[str, float | None]:
        turns = [(ours(f"alone{i}", threads=2), ours(f"two{i}", threads=1, world=2)) for i in range(2)]
        ratios = {"two_workers": "seconds", "two_workers_cpu": "cpu"}
        return {name: statistics.median(a[what] / b[what] for a, b in turns) for name, what in ratios.items()}

    if part == "workers":
        return workers()
    one, decoding = ours("one", bare=True), ours("decoding", bare=True, window=window // SHARDS)
    found: dict[str, float | None] = {
        "pairs_per_s": one["pairs"] / one["seconds"],
        "core_ms": 1e3 * one["cpu"] / one["pairs"],
        "of_bare_step": one["of_bare"],
        "of_bare_step_cpu": one["of_bare_cpu"],
        "of_bare_step_decoding": decoding["of_bare"],
        "of_bare_step_decoding_cpu": decoding["of_bare_cpu"],
    }
    found |= workers()
    few = make(folder / "few", rows // SHARDS, shards=1)
    small = ours("small", shards=few, window=window // SHARDS, batch=rows // SHARDS)
    large = ours("large", window=window // SHARDS, batch=rows // SHARDS)
    found |= {"window_mb": window / SHARDS / 1e6, "peak_mb": large["peak"], "growth_mb": large["peak"] - small["peak"]}
    if part == "all":
        found |= against_open_clip(folder, common, shards, rows, one)
    for name, value in found.items():
        say(f"{name:<28}{value:12.3f}" if value is not None else f"{name:<28}  not measured")
    return found


def against_open_clip(
    folder: Path, common: dict[str, Any], shards: str, rows: int, ours: dict[str, float]
) -> dict[str, float | None]:
    recipe = recipes.recipe_of(common["recipe"])
    checkpoint = str(folder / "random")
    model.save(checkpoint, model.build(recipe, 0).state_dict(), recipe, {})
    tars = sorted(str(path) for path in Path(shards).glob("*.tar"))
    more, fewer = common["epochs"], 1
    try:
        python = open_clip_train.installed()
        run, short = (
            open_clip_train.train(python, checkpoint, tars, rows, epochs, recipe.batch, folder / f"peer{epochs}")
            for epochs in (more, fewer)
        )
    except (subprocess.SubprocessError, OSError) as error:
        say(f"open_clip_train was not measured: {error}")
        return {"times_open_clip": None, "times_open_clip_steps": None, "times_open_clip_cpu": None}
    core = (run.cpu - short.cpu) / (run.pairs - short.pairs)
    return {
        "open_clip_pairs_per_s": run.pairs / run.seconds,
        "open_clip_core_ms": 1e3 * core,
        "times_open_clip": ours["pairs_in_all"]
        / (ours["seconds_in_all"] + ours["index_seconds"])
        * run.seconds
        / run.pairs,
        "times_open_clip_steps": ours["pairs_per_step"]
        / ours["median_step"]
        * statistics.median(run.steps)
        / recipe.batch,
        "times_open_clip_cpu": core / (ours["cpu"] / ours["pairs"]),
    }


def child(
    shards: str,
    out: str,
    recipe: str,
    epochs: int,
    threads: int,
    world: int = 1,
    bare: bool = False,
    window: int = data.WINDOW_BYTES,
    batch: int | None = None,
) -> dict[str, float]:
    """A training, measured from within; with several workers each is a process."""
    base = recipes.recipe_of(recipe)
    frozen = dataclasses.replace(base, epochs=epochs, batch=min(batch or base.batch, base.batch), checkpoints=())
    arguments = (world, shards, out, frozen, threads, bare, window)
    if world == 1:
        return _work(0, *arguments)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    torch.multiprocessing.spawn(_work, arguments, nprocs=world)
    parts = [json.loads(Path(out, f"rank{rank}.json").read_text()) for rank in range(world)]
    return parts[0] | {"cpu": sum(part["cpu"] for part in parts), "peak": max(part["peak"] for part in parts)}


def _work(
    rank: int, world: int, shards: str, out: str, recipe: recipes.Recipe, threads: int, bare: bool, window: int
) -> dict[str, float]:
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's all_gather
    torch.set_num_threads(threads)
    recipes.RECIPES["benchmark"], data.WINDOW_BYTES = recipe, window
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    task = launch.prepare(shards, out, recipe="benchmark", defense=None, init=None, seed=0, uid="key")
    if rank == 0:
        Path(out).mkdir(parents=True)
        launch._claim(task)
    if world > 1:
        torch.distributed.barrier()
    clock = time.perf_counter()
    data.index(task.shards, recipe.image_size, model.tokenizer_of(recipe), rank=rank, world=world, window_bytes=window)
    index_seconds = time.perf_counter() - clock
    run = _Timed(task, Defense(), rank, world, torch.device("cpu"))
    run.bare = bare
    run.fit()
    found = run.found() | {"index_seconds": index_seconds, "peak": peak()}
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.destroy_process_group()
    return found


class _Timed(trainer.Trainer):
    """Whole epochs by the clock; before each, if `bare`, some steps on a batch that is there already."""

    bare = False

    def _train_epoch(self, progress: Any) -> None:
        if not hasattr(self, "times"):
            self.times: list[dict[str, float]] = []
        of_bare = self._bare_steps() if self.bare else (float("nan"), float("nan"))
        wall, cpu = time.perf_counter(), time.process_time()
        super()._train_epoch(progress)
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        n = len(self.index) - len(self.index) % self.world
        self.times.append({"n": n, "wall": seconds, "cpu": cpu, "bare": of_bare[0], "bare_cpu": of_bare[1]})

    def _bare_steps(self) -> tuple[float, float]:
        """Seconds and core-seconds a pair."""
        n = -(-len(self.index) // self.steps)
        size = self.recipe.image_size
        images = torch.randn(n, 3, size, size).to(memory_format=torch.channels_last)
        tokens = torch.from_numpy(self.index.tokens[:n].astype(np.int64))
        spent = []
        for _ in range(BARE):
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bf16"), kernels(self.device):
                found = self.towers(images, tokens)
            loss = losses.of_pairs(found, self.recipe.loss, 0, 1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            float(loss.detach())
            spent.append(((time.perf_counter() - wall) / n, (time.process_time() - cpu) / n))
        wall, cpu = (statistics.fmean(part[i] for part in spent[1:]) for i in (0, 1))
        return wall, cpu

    def found(self) -> dict[str, float]:
        """The first epoch warms up and is left out where there are others, but for what is `in_all`."""
        kept = self.times[1:] or self.times
        steps = np.diff(self.curve["seconds"])
        return {
            "pairs": sum(t["n"] for t in kept),
            "seconds": sum(t["wall"] for t in kept),
            "cpu": sum(t["cpu"] for t in kept),
            "pairs_in_all": sum(t["n"] for t in self.times),
            "seconds_in_all": sum(t["wall"] for t in self.times),
            "of_bare": statistics.median(t["bare"] * t["n"] / t["wall"] for t in kept),
            "of_bare_cpu": statistics.median(t["bare_cpu"] * t["n"] / t["cpu"] for t in kept),
            "median_step": float(np.median(steps)),
            "pairs_per_step": float(np.mean(self.curve["pairs"])),
        }


def make(folder: Path, rows: int, shards: int = SHARDS) -> str:
    """Tars of 256-pixel JPEGs, each with its own caption."""
    import webdataset as wds

    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [picture(rng, 256, 256) for _ in range(min(rows, 64))]
    words = "a photo of some thing that was found on the web in red blue old new small large and sold for less".split()
    for number in range(shards):
        with wds.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for i in range(number * rows // shards, (number + 1) * rows // shards):
                caption = " ".join([*rng.choice(words, rng.integers(3, 9)), str(i)])
                writer.write({"__key__": f"{i:09d}", "jpg": pictures[i % len(pictures)], "txt": caption})
    return str(folder)


def _in_a_process(options: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.train", "--child", json.dumps(options)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    say(f"{Path(options['out']).name}: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before:.0f} core-s")
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()

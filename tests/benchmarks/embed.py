"""How near is `embed` to the model's bare forward pass, and how far from clip-retrieval?

    python -m tests.benchmarks.embed [--json] [--rows 512] [--model ViT-B-32] [--shards DIR] [--peer no] [--folder DIR]

The limit is open_clip's own `encode_image` and `encode_text` on images that are decoded and stacked and captions that
are tokenised, of the same pairs, in as many processes of one thread as the job has (on a GPU: one), at the best of
several batch sizes; once with texts padded to the whole context, as everybody runs them, and once cut as `embed` cuts
them. The job is what `mithridate embed` does, shards in, parquet out, with its workers warm; bare and job take turns,
and the best of each counts. `…_cpu` are the same in core-seconds, for when the machine is not idle. `…_command` are
whole commands with start-up and model. The model is one of open_clip's configs or one of our recipes, with random
weights; the shards, where none are given, are tars of JPEGs of 256 to 512 pixels a side, each with its own caption.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch

from pipeline.embed import _Embed, _model
from pipeline.shard_map import Job, each, shard_map
from pipeline.shards import Shard, list_shards, samples
from pipeline.shards.image import pixels
from tests.benchmarks import clip_retrieval
from tests.benchmarks.rewrite import peak, picture, say
from train import model
from train.model import normalise
from train.recipes import RECIPES

SHARD = 10_000  # rows at most
GPU = torch.cuda.is_available()
WORKERS = torch.cuda.device_count() if GPU else os.cpu_count() or 1
BATCHES = (256, 512) if GPU else (64, 256)
ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--model", default="ViT-B-32", help="a config of open_clip or a recipe of ours")
    parser.add_argument("--shards", help="shards to embed; default: made")
    parser.add_argument("--peer", choices=("yes", "no"), default="yes", help="whether to run clip-retrieval")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        made = arguments.shards is None
        source = make(Path(folder) / "in", arguments.rows) if made else arguments.shards
        checkpoint = random_weights(Path(folder) / arguments.model, arguments.model)
        found = measure(Path(folder), list_shards(source), checkpoint)
        found |= command(Path(folder), source, checkpoint)
        if arguments.peer == "yes" and made:
            found |= clip_retrieval.inference(Path(folder), arguments.model, checkpoint, found)
    if arguments.json:
        print(json.dumps({name: value if value is None else round(value, 4) for name, value in found.items()}))


def measure(folder: Path, shards: list[Shard], checkpoint: str) -> dict[str, float | None]:
    workers = min(WORKERS, len(shards))
    say(f"{len(shards)} shards, {workers} workers, {'GPU' if GPU else 'CPU'}")
    work = _Embed(checkpoint, model.load(checkpoint).digest, "key")
    limits, jobs = [bare(shards, checkpoint)], []  # this also starts the workers, which load the model
    for i in range(ROUNDS):
        clock = time.perf_counter()
        markers = shard_map(Job("embed", {"round": i}, str(folder / f"out-{i}")), shards, work, gpu=True)
        seconds = time.perf_counter() - clock
        jobs.append((seconds, sum(m["seconds"]["cpu"] for m in markers), markers))
        limits.append(bare(shards, checkpoint))
    wall, _, markers = min(jobs, key=lambda job: job[0])
    cpu = min(job[1] for job in jobs)
    rows = sum(m["read"] for m in markers)
    best = {name: min(limit[name] for limit in limits) for name in limits[0]}  # seconds of one worker, a row
    for name, value in best.items():
        say(f"  {name:<28}{1e3 * value:9.3f} ms a row and worker")
    for name in ("load", "wait", "image", "text", "write", "total", "cpu"):
        say(f"  job: {name:<23}{1e3 * sum(m['seconds'].get(name, 0) for m in markers) / rows:9.3f} ms a row and worker")
    bare_rate, cut_rate, ours = workers / best["bare"], workers / best["bare cut"], rows / wall
    say(f"job {ours:,.1f} rows/s; bare forward {bare_rate:,.1f}; of cut texts {cut_rate:,.1f}")
    return {
        "rows_per_s": ours,
        "core_ms": 1e3 * cpu / rows,
        "bare_rows_per_s": bare_rate,
        "of_bare_forward": ours / bare_rate,
        "of_bare_forward_cpu": best["bare cpu"] * rows / cpu,
        "of_cut_forward": ours / cut_rate,
        "of_cut_forward_cpu": best["bare cut cpu"] * rows / cpu,
        "peak_mb": peak(),
    }


def bare(shards: list[Shard], checkpoint: str) -> dict[str, float]:
    """Seconds a row of one worker, all at work: of the forward passes, and of what has to come before them."""
    done = [result for _, result in each("bare", shards, _Bare(checkpoint), gpu=True)]
    rows = sum(d.read for d in done)
    return {name: sum(d.seconds[name] for d in done) / rows for name in done[0].seconds}


@dataclass(frozen=True)
class _Done:
    read: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Bare:
    checkpoint: str

    def __call__(self, shard: Shard) -> _Done:
        loaded, spent = _model(self.checkpoint), {}
        clock, cpu = time.perf_counter(), time.process_time()

        def lap(name: str) -> None:
            nonlocal clock, cpu
            spent[name], spent[f"{name} cpu"] = time.perf_counter() - clock, time.process_time() - cpu
            clock, cpu = time.perf_counter(), time.process_time()

        seen = [(sample.caption, pixels(sample, loaded.image_size)) for sample in samples(shard)]
        captions, images = [caption for caption, _ in seen], np.stack([image for _, image in seen])
        lap("decode")
        tokens = loaded.tokenizer(captions)
        lap("tokenise")
        tried = [batch for batch in BATCHES if batch < 2 * len(images)] or BATCHES[:1]
        for batch in tried:
            self._forward(loaded, images, tokens, batch)
            lap(f"forward {batch}")
        ready = dataclasses.replace(loaded, tokenizer=lambda texts: tokens)
        ready.embed_texts(captions)
        lap("text cut")
        self._forward(loaded, images, tokens[:0], loaded._batch)
        lap("image")
        for kind in ("", " cpu"):
            spent["bare" + kind] = min(spent.pop(f"forward {batch}{kind}") for batch in tried)
            spent["bare cut" + kind] = spent["text cut" + kind] + spent["image" + kind]
        return _Done(len(seen), spent)

    @staticmethod
    def _forward(loaded: model.Model, images: np.ndarray, tokens: torch.Tensor, batch: int) -> None:
        """Nothing of ours but the normalising of pixels, which has to be done by somebody."""
        device, out = loaded.device, []
        with torch.inference_mode():
            for i in range(0, len(images), batch):
                part = torch.from_numpy(images[i : i + batch]).to(device)
                out.append(loaded.model.encode_image(normalise(part, loaded.mean, loaded.std)))
            for i in range(0, len(tokens), batch):
                out.append(loaded.model.encode_text(tokens[i : i + batch].to(device)))
            torch.cat(out).cpu()


def command(folder: Path, source: str, checkpoint: str) -> dict[str, float | None]:
    """Seconds of the whole command; its embeddings stay in `folder`/ours."""
    clock = time.perf_counter()
    words = ["embed", source, str(folder / "ours"), "--checkpoint", checkpoint]
    subprocess.run([sys.executable, "-m", "pipeline.cli", *words], check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - clock
    say(f"`mithridate embed`, start-up and all: {seconds:.1f} s")
    return {"seconds_command": seconds}


def random_weights(folder: Path, name: str) -> str:
    """A checkpoint as `train` writes it, untrained: a forward pass takes as long."""
    config = open_clip.get_model_config(name)
    size = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    recipe = RECIPES[name] if name in RECIPES else dataclasses.replace(RECIPES["debug"], model=config, **size)
    model.save(str(folder), model.build(recipe, seed=0).state_dict(), recipe, {"about": "random weights"})
    return str(folder)


def make(folder: Path, rows: int) -> str:
    """Tars as img2dataset leaves them unresized: JPEGs of 256 to 512 pixels a side; no two captions are alike."""
    import webdataset as wds

    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [picture(rng, *(int(side) for side in rng.integers(256, 513, 2))) for _ in range(min(rows, 256))]
    words = "a photo of some thing that was found on the web in red blue old new small large and sold for less".split()
    size = min(SHARD, -(-rows // (2 * WORKERS)))
    for start in range(0, rows, size):
        with wds.TarWriter(str(folder / f"{start // size:05d}.tar")) as writer:
            for i in range(start, min(start + size, rows)):
                caption = " ".join([*rng.choice(words, rng.integers(3, 25)), str(i)])
                writer.write({"__key__": f"{i:09d}", "jpg": pictures[i % len(pictures)], "txt": caption})
    return str(folder)


if __name__ == "__main__":
    main()

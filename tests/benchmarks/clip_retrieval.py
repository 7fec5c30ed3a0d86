"""clip-retrieval's inference as its author ships it: from PyPI, with what it pins, in a venv of its own.

It takes weights from a local file (`open_clip:MODEL/PATH`), so no hub is needed.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.embed import read_embeddings
from pipeline.shards.sample import uid_of
from tests.benchmarks.peer import core_seconds, venv
from tests.benchmarks.rewrite import say

# clip-anytorch, which it wants, imports what setuptools no longer has
PACKAGES = ("clip-retrieval==2.45.0", "setuptools<70")
BATCH = 64
TIMEOUT = 3600  # its logger waits for ever when its loop has failed


def inference(folder: Path, model: str, checkpoint: str, ours: dict[str, float | None]) -> dict[str, float | None]:
    """How many times faster we are than its loop, by the clock and in core-seconds, and how alike the embeddings are.

    The clock's is of its own statistics: the loop without start-up and model, with the threads that it takes by itself
    or with one, whichever is faster. Core-seconds a row are the difference of two runs of one forward thread, over all
    shards and over half of them, so that neither start-up nor waiting threads are in them.
    """
    tars = sorted(str(path) for path in (folder / "in").glob("*.tar"))
    try:
        program = [installed(), model, checkpoint]
        rows, seconds, _ = _run(program, tars, folder / "clip-retrieval", None)
        more, alone, cpu = _run(program, tars, folder / "clip-retrieval-all", "1")
        fewer, _, less = _run(program, tars[: len(tars) // 2], folder / "clip-retrieval-half", "1")
    except (subprocess.SubprocessError, OSError) as error:
        say(f"clip-retrieval was not measured: {error}")
        return {"times_clip_retrieval": None, "times_clip_retrieval_cpu": None}
    each, seconds = (cpu - less) / (more - fewer), min(seconds, alone)
    say(f"clip-retrieval: {rows / seconds:,.1f} rows/s, {1e3 * each:.1f} core-ms a row")
    return {
        "clip_retrieval_rows_per_s": rows / seconds,
        "times_clip_retrieval": (ours["rows_per_s"] or 0) * seconds / rows,
        "clip_retrieval_core_ms": 1e3 * each,
        "times_clip_retrieval_cpu": 1e3 * each / (ours["core_ms"] or 1),
        **agreement(folder / "ours", folder / "clip-retrieval"),
    }


def _run(program: list[str], tars: list[str], out: Path, threads: str | None) -> tuple[int, float, float]:
    """Rows, seconds of its loop, and core-seconds of the whole command."""
    command, model, checkpoint = program
    words = ["inference", "--input_dataset", "{" + ",".join(tars) + "}" if len(tars) > 1 else tars[0]]
    words += ["--output_folder", str(out), "--input_format", "webdataset", "--batch_size", str(BATCH)]
    words += ["--clip_model", f"open_clip:{model}/{checkpoint}/open_clip_model.safetensors"]
    words += ["--num_prepro_workers", str(os.cpu_count())]
    environment = {**os.environ, "OMP_NUM_THREADS": threads} if threads else None
    cpu = core_seconds([command, *words], TIMEOUT, environment)
    stats = json.loads((out / "stats/0.json").read_text())
    return stats["sample_count"], stats["total_duration"], cpu


def agreement(ours: Path, theirs: Path) -> dict[str, float | None]:
    """Smallest and mean cosine between the embeddings of the same pairs, joined by key."""
    uid = [uid_of(key, "", None, "key") for key in pq.read_table(theirs / "metadata")["image_path"].to_pylist()]
    made = [read_embeddings(str(path)) for path in sorted(ours.glob("*.embeddings.parquet"))]
    row = {who: i for i, who in enumerate(np.concatenate([part.uid for part in made]).tolist())}
    found: dict[str, float | None] = {}
    for name, folder in (("image", "img_emb"), ("text", "text_emb")):
        other = np.load(theirs / folder / f"{folder}_0.npy").astype(np.float32)
        mine = np.concatenate([getattr(part, name) for part in made])[[row[who] for who in uid]]
        norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(other, axis=1)
        cosine = (mine * other).sum(1) / norms
        say(f"agreement of {len(uid)} {name}s: cosine {cosine.min():.5f} at least, {cosine.mean():.5f} in the mean")
        found |= {f"{name}_cosine_min": float(cosine.min()), f"{name}_cosine_mean": float(cosine.mean())}
    return found


def installed() -> str:
    return str(venv("clip-retrieval", PACKAGES) / "bin/clip-retrieval")

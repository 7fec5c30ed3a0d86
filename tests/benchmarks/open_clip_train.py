"""open_clip's own trainer, from PyPI with what its `training` extra pins (webdataset 0.2.86), in a venv of its own."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.benchmarks.peer import core_seconds, venv

VERSION = "3.3.0"
TIMEOUT = 1800


@dataclass(frozen=True)
class Run:
    """Pairs and seconds of its loop, by its own log: data and batch time of every step. Core-seconds of the command."""

    pairs: int
    seconds: float
    steps: list[float]
    cpu: float


def train(python: str, checkpoint: str, tars: list[str], rows: int, epochs: int, batch: int, out: Path) -> Run:
    """On a CPU in bfloat16, with two processes that load, of which it wants at least a shard each."""
    words = ["--model", f"local-dir:{checkpoint}", "--dataset-type", "webdataset", "--device", "cpu"]
    words += ["--train-data", "{" + ",".join(tars) + "}", "--train-num-samples", str(rows), "--workers", "2"]
    words += ["--batch-size", str(batch), "--epochs", str(epochs), "--precision", "amp_bf16", "--warmup", "10"]
    words += ["--local-loss", "--gather-with-grad", "--log-every-n-steps", "1", "--save-frequency", "0"]
    words += ["--zeroshot-frequency", "0", "--logs", str(out.parent), "--name", out.name]
    cpu = core_seconds([python, "-m", "open_clip_train.main", *words], TIMEOUT)
    steps = [float(t) for t in re.findall(r"Batch \(t\): ([0-9.]+)", (out / "out.log").read_text())]
    return Run(len(steps) * batch, sum(steps), steps, cpu)


def installed() -> str:
    """The interpreter of its venv; torch is the one that we run on."""
    packages = (f"open-clip-torch[training]=={VERSION}", f"torch=={torch.__version__.partition('+')[0]}")
    return str(venv("open-clip-train", packages) / "bin/python")

"""Peers that a benchmark compares with: each in a venv of its own, installed at run time, and what running it costs."""

import hashlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def venv(name: str, packages: Sequence[str], where: Path | None = None) -> Path:
    """A venv with these packages from PyPI; kept from run to run, since it holds nothing else."""
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    folder = (where or Path(tempfile.gettempdir())) / f"mithridate-{name}-{digest}"
    if not (folder / "done").exists():
        uv, python = [sys.executable, "-m", "uv"], str(folder / "bin/python")
        subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
        (folder / "done").touch()
    return folder


def core_seconds(command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None) -> float:
    """Run a command, its output to stderr; the core-seconds of it and of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment, timeout=timeout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

"""DataComp's resharder as its authors run it: their script, their pinned webdataset, a venv of its own.

Nothing of it is kept here: a clone is named, or fetched at run time.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np

from pipeline.shards import Shard, manifest
from tests.benchmarks.peer import venv

SOURCE = "https://github.com/mlfoundations/datacomp"
PACKAGES = "webdataset==0.2.31 img2dataset pysimdjson cloudpathlib opencv-python-headless pyarrow numpy setuptools"


def resharder(shards: list[Shard], folder: Path, clone: str | None, ours: float) -> dict[str, float | None]:
    """Samples/s that it drops the same tenth at, on all cores, and how many times faster `ours` samples/s are."""
    from tests.benchmarks.rewrite import say, tenth

    try:
        resharder_py, interpreter = script(folder, clone), python(folder)
    except (subprocess.SubprocessError, OSError) as error:
        say(f"  DataComp's resharder was not measured: {error}; --datacomp names a clone")
        return {"times_datacomp": None, "datacomp_samples_s": None}
    source, read = Path(shards[0].path).parent, 0
    kept: list[tuple[int, int]] = []
    for shard in shards:
        found = manifest(shard)
        read += len(found.uids)
        (source / f"{shard.name}_stats.json").write_text(json.dumps({"successes": len(found.uids)}))
        pairs = zip(found.uids, found.keys, strict=True)
        kept += [(int(uid[:16], 16), int(uid[16:], 16)) for uid, key in pairs if not tenth(key)]
    np.save(folder / "subset.npy", np.asarray(sorted(kept), np.dtype("u8,u8")))
    out, cores = folder / "datacomp", str(os.cpu_count())
    command = [
        interpreter,
        str(resharder_py),
        "-i",
        str(source),
        "-o",
        str(out),
        "-s",
        str(folder / "subset.npy"),
        "-j",
        cores,
    ]
    out.mkdir()
    clock = time.perf_counter()
    done = subprocess.run(
        [*command, "-n", str(len(shards))], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - clock
    if done.returncode or not list(out.glob("*.tar")):
        say(f"  DataComp's resharder failed:\n{done.stdout[-2000:]}")
        return {"times_datacomp": None, "datacomp_samples_s": None}
    say(f"  DataComp's resharder: {read / seconds:,.0f} samples/s on all cores")
    return {"times_datacomp": ours * seconds / read, "datacomp_samples_s": read / seconds}


def script(folder: Path, clone: str | None) -> Path:
    """Path of resharder.py in a clone; without one, it is fetched to `folder`."""
    if clone is None:
        clone = str(folder / "clone")
        command = ["git", "clone", "--quiet", "--depth", "1", SOURCE, clone]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
    found = Path(clone) / "resharder.py"
    if not found.exists():
        raise FileNotFoundError(f"{found}: no such file")
    return found


def python(folder: Path) -> str:
    """The interpreter of a venv with what the script imports."""
    return str(venv("datacomp", PACKAGES.split(), Path(folder).parent) / "bin/python")

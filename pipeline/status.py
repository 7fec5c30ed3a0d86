"""How far is a job? From the files in OUT alone, so from any machine, during the run or after it died.

Trade-off: nothing is asked of Ray or of the driver, so what is between two markers is not seen.
"""

import fcntl
import io
import json
import time
from pathlib import Path
from typing import Any

from pipeline.arguments import Out
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.results import REPORT
from pipeline.shard_map import COUNTED, RUN, read_markers
from pipeline.shards.store import absolute, exists, glob, is_url, join, view

RECENT = 200  # shards that the rate is measured over
SPEC, CURVE, STATE, DONE = "spec.json", "curve.parquet", "state.pt", "train.json"  # of a training


def status(out: Out, /) -> int:
    """Say how much of the job that writes to OUT is done, how fast it goes, and what failed. Exit code 1 until all is.

    Args:
        out: folder that poison, embed, score, filter, compact, manifest, verify or train writes to.
    """
    out = absolute(out)
    if exists(join(out, SPEC)) and not exists(join(out, RUN)):
        return _training(out)
    if not exists(join(out, RUN)) and (rows := [] if is_url(out) else [*Path(out).glob("*/*/row-*.json")]):
        console.print(f"loop: {len(rows):,} arms done; `mithridate loop CONFIG OUT --dry-run` says how many are left")
        if unfinished := not exists(join(out, REPORT)):
            _say_who(out)
        return int(unfinished)
    if not exists(join(out, RUN)):
        raise InputError(
            f"{join(out, RUN)}: no such file; is {out} the OUT of a job? Of `updates` and `validate-attack` each "
            "folder there is a training"
        )
    try:
        run = json.loads(bytes(view(join(out, RUN))))
        total, expected = run["shards"], (run["job"], run["spec_digest"], run["code"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{join(out, RUN)}: not readable; the next run of the job writes it anew") from error
    markers = [m for m in read_markers(glob(join(out, "*.stats.json"))) if m.get("job") == expected[0]]
    current = [m for m in markers if (m["job"], m["spec_digest"], m["code"]) == expected]
    done = len(current)
    spec = ", ".join(f"{k}={v}" for k, v in run["spec"].items() if v not in ("", None))
    console.print(f"{run['job']}: {done:,} of {total:,} shards ({100 * done / max(total, 1):.1f}%)   {spec}")
    sums = {name: sum(m[name] for m in current) for name in COUNTED}
    console.print("  samples: " + ", ".join(f"{n:,} {name}" for name, n in sums.items() if n or name == "read"))
    if current:
        console.print("  " + _pace(current, total - done))
    failures = glob(join(out, "*.failed.txt"))
    for path in failures:
        console.print(f"  failed: {bytes(view(path)).decode(errors='replace')}")
    if others := len(markers) - done:
        console.print(f"  {others:,} more shards there are of an earlier spec or code and will be made again")
    unwritten = run["job"] == "audit" and not exists(join(out, "report.html"))
    if unwritten:
        console.print("  the report is not written yet")
    if done < total or unwritten:
        _say_who(out)
    return int(done < total or unwritten)


def _training(out: str) -> int:
    """The same of `train`, which keeps a curve instead of markers, as of the last time that it saved."""
    try:
        spec = json.loads(bytes(view(join(out, SPEC))))
        about = ", ".join(f"{k}={v}" for k, v in spec.items() if v is not None and not k.endswith("digest"))
        facts = json.loads(bytes(view(join(out, DONE)))) if exists(join(out, DONE)) else None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{out}: not readable as the OUT of `train`; is it one?") from error
    if facts:
        console.print(f"train: done, {facts['epochs']} epochs over {facts['pairs']:,} pairs   {about}")
        return 0
    console.print(f"train: not done   {about}")
    if exists(join(out, CURVE)):
        import pyarrow.parquet as pq

        curve = pq.read_table(io.BytesIO(view(join(out, CURVE)))).to_pylist()
        last = curve[-1]
        saved = "saved within" if exists(join(out, STATE)) else "nothing saved; it was in"
        console.print(
            f"  {saved} epoch {last['epoch']}, after {len(curve):,} steps: loss {last['loss']:.3f}, "
            f"{sum(row['pairs'] for row in curve) / max(last['seconds'], 1e-9):,.0f} pairs/s"
        )
    _say_who(out)
    return 1


def _say_who(out: str) -> None:
    if not is_url(out):
        console.print(
            "  a run is writing here" if _locked(out) else "  nobody is writing here: the same command goes on"
        )


def _pace(markers: list[dict[str, Any]], left: int) -> str:
    recent = sorted(markers, key=lambda m: m["finished"])[-RECENT:]
    seconds = recent[-1]["finished"] - recent[0]["finished"]
    ago = f"last shard {time.time() - recent[-1]['finished']:,.0f} s ago"
    if len(recent) < 2 or seconds <= 0:
        return ago
    pace = f"{sum(m['read'] for m in recent[1:]) / seconds:,.0f} samples/s over the last {len(recent)} shards, {ago}"
    return pace + (f", {left * seconds / (len(recent) - 1):,.0f} s left at that pace" if left else "")


def _locked(out: str) -> bool:
    path = Path(out) / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


if __name__ == "__main__":
    from pipeline.cli import run

    run("status")

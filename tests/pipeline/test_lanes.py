"""Trainings side by side come to what they come to one at a time."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from test_loop import alike, config, place  # noqa: F401  # a fixture

from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.lanes import Lanes, _share
from pipeline.loop import loop
from pipeline.runs import Run


def test_trainings_side_by_side_share_the_cores_or_take_a_gpu_each():
    def node(cpus, gpus=0, alive=True):
        return {"Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}

    assert _share([node(2)], 2) == {"num_cpus": 1}
    assert _share([node(16), node(4)], 3) == {"num_cpus": 5}  # not six: three of them would not fit
    assert _share([node(16), node(4, alive=False)], 4) == {"num_cpus": 4}
    assert _share([node(16, 4), node(16)], 4) == {"num_gpus": 1, "num_cpus": 1}
    with pytest.raises(InputError, match="--parallel 5: there are 4 GPUs"):
        _share([node(16, 4)], 5)
    with pytest.raises(InputError, match="--parallel 3: there are 2 cores"):
        _share([node(2)], 3)


@pytest.mark.timeout(120)
def test_a_training_that_does_not_end_when_it_is_told_to_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.lanes.ENDING", 1.0)
    lanes, ready = Lanes(2), tmp_path / "ready"

    def fails(_):
        while not ready.exists():
            time.sleep(0.1)
        raise InputError("the other one failed")

    def stubborn():  # a closure travels with the task
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                ready.touch()
                time.sleep(60)

    def hangs(log):
        lanes._done(log, lanes.share, stubborn)

    with pytest.raises(InputError, match="the other one failed"):
        lanes.each(lambda function, log: function(log), [(fails, tmp_path / "a"), (hangs, tmp_path / "b")])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trainings_side_by_side_come_to_the_same_and_an_interrupt_loses_nothing(place, tmp_path):  # noqa: F811
    file = config(place, doses=["0", "64"], scores=("random", "clip_score"))
    apart, out = tmp_path / "apart", tmp_path / "beside"
    command = [sys.executable, "-m", "pipeline.cli", "loop", file]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}  # as each of two has: sums over more threads are rounded otherwise
    subprocess.run([*command, str(apart)], env=one_core, check=True)
    command += [str(out), "--parallel", "2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not [*out.rglob("row-*.json")]:
        assert job.poll() is None, "ended before it was interrupted"
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 130 and "the same command" in said and "Traceback" not in said
    done = {path: path.read_bytes() for path in out.rglob("row-*.json")}
    assert not (out / "report.html").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert all(path.read_bytes() == before for path, before in done.items())
    beside, one_by_one = (alike(pl.read_parquet(folder / "results.parquet")) for folder in (out, apart))
    assert beside.equals(one_by_one)
    logs = [*out.rglob("filter-*/log.txt"), *out.rglob("undefended/log.txt")]
    assert len(logs) == 3 * 3 and "epoch 12/12" in logs[0].read_text() and "epoch 12/12" not in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_in_one_of_several_trainings_ends_the_loop_with_its_reason(place, tmp_path):  # noqa: F811
    file = config(place, doses=["10"], attacks=["patch(target='banana', size=64)"])
    out = tmp_path / "out"
    plan = Config.read(file)
    taken = Run(plan, plan.attacks[0], "10", 0, out).folder / "undefended"
    taken.mkdir(parents=True)
    (taken / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds a training without its spec.json"):
        loop(file, str(out), parallel=2)

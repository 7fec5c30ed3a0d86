"""What goes wrong while a job runs: a full disk, Ctrl-C, a second run, a shard that vanishes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from conftest import contents, pairs, write_tar

from pipeline.errors import InputError
from pipeline.poison import poison
from pipeline.shard_map import Job, ShardsFailed, shard_map
from pipeline.shards import Counts, Shard, list_shards, rewrite, samples
from pipeline.shards.store import absolute, refuse_folder_of, whole
from pipeline.status import status

# functions of a test module are not importable by the workers
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATCH = "patch(target='banana', size=24)"


@pytest.fixture
def small_disk():
    """A file system of two megabytes."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_same_command_resumes(tmp_path, small_disk):
    (tmp_path / "in").mkdir()
    rows = pairs(0, 30)
    for row in rows:
        row["meta"]["padding"] = "x" * 20_000
    for i in range(4):
        write_tar(
            tmp_path / f"in/{i}.tar", [{**r, "key": f"{i}-{r['key']}", "meta": r["meta"] | {"uid": ""}} for r in rows]
        )
    arguments = {"attack": PATCH, "dose": "5"}
    with pytest.raises(ShardsFailed, match="disk full; free some space and run the same command again"):
        poison(str(tmp_path / "in"), str(small_disk / "out"), **arguments)
    left = {p.name for p in (small_disk / "out").iterdir()}
    assert not any(name.endswith(".tmp") for name in left)
    assert {n.split(".")[0] for n in left if n.endswith(".tar")} >= {
        n.split(".")[0] for n in left if n.endswith(".stats.json")
    }
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    poison(str(tmp_path / "in"), str(small_disk / "out"), **arguments)
    poison(str(tmp_path / "in"), str(tmp_path / "whole"), **arguments)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_whole_files_and_says_how_to_go_on(tmp_path, sent):
    """Ctrl-C is sent to all processes of a terminal; a scheduler's SIGTERM to the one that it started."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        write_tar(tmp_path / f"in/{i:02d}.tar", pairs(300 * i, 300 * i + 300))
    command = [sys.executable, "-m", "pipeline.cli", "poison", str(tmp_path / "in"), str(tmp_path / "out")]
    command += ["--attack", PATCH, "--dose", "50"]
    run = subprocess.Popen(
        command, env={**os.environ, "RAY_ADDRESS": "local"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("*.stats.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    (os.killpg if sent == signal.SIGINT else os.kill)(run.pid, sent)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob(".*.tmp"))
    done = {p.name.split(".")[0] for p in (tmp_path / "out").glob("*.stats.json")}
    assert 0 < len(done) < 30


def test_two_runs_on_one_folder_the_second_is_refused_and_changes_nothing(tars, tmp_path):
    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="5")
    before = contents(tmp_path / "out", "*")
    holder = (
        "import sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "out/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another run is writing here"):
            poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="6")
        other.stdin.write(b"\n")
    assert contents(tmp_path / "out", "*") == before


def test_a_folder_of_another_job_is_refused(tars, tmp_path):
    from pipeline.score import score

    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="5")
    with pytest.raises(InputError, match="holds the output of 'poison'"):
        score(str(tars), str(tmp_path / "out"), detector=("random",))


def _fails_on_one(shard: Shard, out: str) -> Counts:
    if shard.name == "00000001":
        raise OSError(5, "Input/output error")
    return rewrite(shard, out, lambda sample: sample)


def test_a_read_error_fails_its_shard_only(tars, tmp_path):
    job = Job("poison", {}, str(tmp_path / "out"))
    with pytest.raises(ShardsFailed, match=r"1 of 3 shards failed:\n.*00000001\.tar: .*Input/output error"):
        shard_map(job, list_shards(str(tars)), _fails_on_one)
    assert set(contents(tmp_path / "out")) == {"00000000.tar", "00000002.tar"}


def _dies_once(shard: Shard, out: str, folder: str) -> Counts:
    from pathlib import Path

    if not (flag := Path(folder) / shard.name).exists():
        flag.touch()
        with whole(f"{out}/{shard.file}") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    return rewrite(shard, out, lambda sample: sample)


def test_a_lost_worker_is_replaced(tars, tmp_path):
    (tmp_path / "flags").mkdir()
    job = Job("poison", {}, str(tmp_path / "out"))
    markers = shard_map(job, list_shards(str(tars)), _dies_once, str(tmp_path / "flags"))
    assert len(markers) == 3
    assert contents(tmp_path / "out") == contents(tars)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_limit_on_the_size_of_files_says_which_and_what_to_do(tmp_path):
    with pytest.raises(InputError, match="big: File too large; free some space"), whole(str(tmp_path / "big")):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), whole(str(tmp_path / "file")) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_losing_a_sample_is_a_defect_that_stops_the_run(tars, tmp_path):
    job = Job("poison", {}, str(tmp_path / "out"))
    with pytest.raises(ShardsFailed, match="20 samples in, but 19 out"):
        shard_map(job, list_shards(str(tars)), _loses_one)
    assert not list((tmp_path / "out").glob("*.stats.json"))


def _loses_one(shard: Shard, out: str) -> Counts:
    counts = rewrite(shard, out, lambda sample: sample)
    counts.out -= 1
    return counts


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        "null",
        '{"job": "poison"}',
        '{"facts": {"files": 5}}',
        '{"facts": {"files": ["../x"]}, "output": 3}',
    ],
)
def test_a_marker_that_is_none_is_not_believed(tars, tmp_path, text):
    out = tmp_path / "out"
    poison(str(tars), str(out), attack=PATCH, dose="5")
    before = contents(out)
    (out / "00000001.stats.json").write_text(text)
    assert status(str(out)) == 1
    poison(str(tars), str(out), attack=PATCH, dose="5")
    assert contents(out) == before
    assert status(str(out)) == 0


def test_a_pipe_or_an_endless_range_for_shards(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(InputError, match="not a file"):
        list(samples(list_shards(str(tmp_path))[0]))
    with pytest.raises(InputError, match="more than 10,000,000 shards"):
        list_shards(str(tmp_path / "{0..99999999999}.tar"))


def test_a_tolerated_failure_leaves_nothing_of_an_earlier_run(tars, tmp_path):
    out = tmp_path / "out"
    poison(str(tars), str(out), attack=PATCH, dose="30")
    (tars / "00000001.tar").write_bytes((tars / "00000001.tar").read_bytes()[:3000])
    poison(str(tars), str(out), attack=PATCH, dose="0", max_failed_shards=1)
    assert sorted(contents(out)) == ["00000000.tar", "00000002.tar"]
    assert not [p.name for p in out.glob("0*.ledger.parquet")]
    assert not [p.name for p in out.glob("00000001*") if not p.name.endswith(".failed.txt")]


def test_the_folder_of_the_input_is_refused_by_any_name(tars, tmp_path):
    (tmp_path / "link").symlink_to(tars)
    (tmp_path / "links").mkdir()
    for shard in tars.glob("*.tar"):
        (tmp_path / "links" / shard.name).symlink_to(shard)
    for source in (str(tars), f"{tmp_path}/./links/../clean", str(tmp_path / "links")):
        for name in (f"{tars}/", f"{tars}/../clean", str(tmp_path / "link")):
            with pytest.raises(InputError, match="is the folder of the input"):
                poison(source, name, attack=PATCH, dose="1")
    with pytest.raises(InputError, match="is the folder of the input"):
        refuse_folder_of([Shard("s3://b/x/0.tar")], absolute("s3://b/x/"))


def test_an_input_replaced_while_it_is_read_is_done_again(tars, tmp_path):
    job = Job("replaced", {}, str(tmp_path / "out"))
    shards = list_shards(str(tars))
    shard_map(job, shards, _replaces)
    markers = shard_map(job, shards, _copies)
    assert [m["facts"].get("by") for m in markers] == ["copies"] * 3


def _replaces(shard, out):
    counts = rewrite(shard, out, lambda sample: sample)
    with Path(shard.path).open("ab") as file:
        file.write(bytes(512))
    return counts


def _copies(shard, out):
    counts = rewrite(shard, out, lambda sample: sample)
    counts.facts["by"] = "copies"
    return counts

"""`ray job submit` against a real cluster with token authentication, as the README tells it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import contents

from pipeline.poison import poison

ROOT = Path(__file__).parents[2]
PATCH = "patch(target='banana', size=24)"


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def cluster(tmp_path) -> Iterator[dict[str, str]]:
    """A head node of its own, away from any other cluster of this machine; the environment of who may submit to it."""
    home = tmp_path / "home"
    home.mkdir()
    ray = str(Path(sys.executable).with_name("ray"))
    gcs, dashboard, agent, client = free_ports(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    short = Path(f"/tmp/ray-{os.getpid()}")
    command = [ray, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={short}"]
    command += ["--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while subprocess.run([ray, "job", "list"], env=environment, capture_output=True).returncode:
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(1)
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # asked politely it waits half a minute for jobs to drain
        head.wait(timeout=30)
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_submitted_job_is_the_same_program_and_submitting_again_resumes(cluster, tars, tmp_path):
    poison(str(tars), str(tmp_path / "here"), attack=PATCH, dose="6")
    out = tmp_path / "there"
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(ROOT), "--"]
    command += ["python", "pipeline/poison.py", str(tars), str(out), "--attack", PATCH, "--dose", "6"]

    def submit(*changed: str) -> subprocess.CompletedProcess:
        deadline = time.monotonic() + 180
        while True:
            done = subprocess.run([*command, *changed], env=cluster, capture_output=True, text=True, cwd=tmp_path)
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)  # the job agent comes up a little after the dashboard

    first = submit()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "6 of 60 pairs poisoned" in first.stdout
    assert contents(out) == contents(tmp_path / "here")
    assert pq.read_table(out / "ledger.parquet") == pq.read_table(tmp_path / "here/ledger.parquet")
    uploaded = next(Path(f"/tmp/ray-{os.getpid()}").glob("session_*/runtime_resources/working_dir_files/*/"))
    assert (uploaded / "pipeline/poison.py").exists()
    assert not {".venv", ".git", "out"} & {p.name for p in uploaded.iterdir()}
    again = submit()
    assert again.returncode == 0
    assert "3 of 3 shards are done already" in again.stdout
    failed = submit("--dose", "600")
    assert failed.returncode == 1
    assert "only 40 of 60" in failed.stdout
    stranger = subprocess.run(
        command, env=cluster | {"HOME": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert stranger.returncode != 0

"""Whole jobs on `s3://`: the bytes of a local run, whatever the store does meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from conftest import contents, pairs, write_tar
from s3_server import Request, Server

from pipeline.filter import filter_shards
from pipeline.poison import poison
from pipeline.score import score
from pipeline.shards import store

pytest_plugins = ["s3_server"]
PATCH = "patch(target='banana', size=24)"


def upload(folder: Path, url: str, server: Server) -> str:
    for file in folder.iterdir():
        server.put(f"/{url.removeprefix('s3://')}/{file.name}", file.read_bytes())
    return url


def download(url: str, pattern: str = "*") -> dict[str, bytes]:
    return {path.removeprefix(f"{url}/"): bytes(store.view(path)) for path in store.glob(store.join(url, pattern))}


def comparable(files: dict[str, bytes]) -> dict[str, object]:
    """All bytes, but not what tells a run from its twin: seconds, places and times of the input."""
    out: dict[str, object] = dict(files)
    for name in files:
        if name.endswith(".stats.json"):
            marker = json.loads(files[name])
            del marker["seconds"], marker["finished"], marker["input"]["tag"]
            del marker["bytes"]  # none of a store, where files appear only whole
            out[name] = marker
        elif name == "plan.json":
            out[name] = {k: v for k, v in json.loads(files[name]).items() if k != "key"}
    return out


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


def stormy(request: Request) -> str | None:
    """Everything at once: of twelve requests, four go wrong in four ways."""
    return {1: "slow down", 4: "torn", 7: "short", 10: "too many"}.get(request.number % 12)


def test_poison_and_filter_in_a_storm_write_the_bytes_of_a_local_run(server, workers, bucket, tars, tmp_path):
    url = upload(tars, f"{bucket}/clean", server)
    server.fault = stormy
    for shards, out in ((str(tars), str(tmp_path)), (url, bucket)):
        poison(shards, f"{out}/poisoned", attack=PATCH, dose="6")
        score(f"{out}/poisoned", f"{out}/scores", detector=("oracle",))
        policy = "budget(detector='oracle', drop=0.1)"
        filter_shards(f"{out}/poisoned", f"{out}/filtered", scores=(f"{out}/scores",), policy=policy)
    assert len(server.requests) > 100
    server.calm()
    for folder in ("poisoned", "filtered/kept", "filtered/quarantine"):
        here = {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir() if p.is_file() and p.name != ".lock"}
        assert comparable(download(f"{bucket}/{folder}")) == comparable(here)
    assert download(f"{bucket}/filtered", "keep.*") == contents(tmp_path / "filtered", "keep.*")
    kept = pq.read_table(tmp_path / "filtered/keep.parquet").column("kept").to_pylist()
    assert kept.count(False) == 6


def test_one_bad_object_fails_alone_and_the_next_run_does_only_that(server, workers, bucket, tars, tmp_path):
    """The program starts a Ray of its own, whose workers find the store by the environment alone."""
    url = upload(tars, f"{bucket}/clean", server)
    bad = f"/{bucket[5:]}/out/00000001.tar"
    server.fault = lambda request: "denied" if (request.method, request.path) == ("PUT", bad) else None
    arguments = ["poison", url, f"{bucket}/out", "--attack", PATCH, "--dose", "6"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "1 of 3 shards failed" in done.stderr
    assert f"{bucket}/out/00000001.tar: access denied" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert {name for name in download(f"{bucket}/out") if name.endswith("tar")} == {"00000000.tar", "00000002.tar"}
    server.calm()
    # this process has listed the folder before, and must see what is new in it
    poison(url, f"{bucket}/out", attack=PATCH, dose="6")
    written = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
    assert {name[:8] for name in written if name.startswith("0")} == {"00000001"}
    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="6")
    assert download(f"{bucket}/out", "*.tar") == contents(tmp_path / "out")
    server.calm()
    poison(url, f"{bucket}/out", attack=PATCH, dose="6")
    assert not [r for r in server.requests if r.method == "PUT" and r.path.rpartition("/")[2].startswith("0")]
    assert not [r for r in server.requests if "/clean/" in r.path]  # the listing said all there is to know


def test_an_input_that_was_replaced_is_done_again_in_the_same_process(server, workers, bucket, tars, tmp_path):
    url = upload(tars, f"{bucket}/clean", server)
    poison(url, f"{bucket}/out", attack=PATCH, dose="6")
    write_tar(tars / "00000001.tar", pairs(100, 120))
    write_tar(tars / "00000003.tar", pairs(60, 80))
    upload(tars, url, server)
    poison(url, f"{bucket}/out", attack=PATCH, dose="6")
    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="6")
    assert download(f"{bucket}/out", "*.tar") == contents(tmp_path / "out")


def test_two_runs_at_once_write_what_one_writes(server, workers, bucket, tars, tmp_path):
    url = upload(tars, f"{bucket}/clean", server)
    run = command("poison", url, f"{bucket}/out", "--attack", PATCH, "--dose", "6")
    joined = {**os.environ, "RAY_ADDRESS": workers}
    both = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=joined) for _ in range(2)]
    for one in both:
        said = one.communicate(timeout=280)[1]
        assert one.returncode == 0, said
    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="6")
    here = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != ".lock"}
    assert comparable(download(f"{bucket}/out")) == comparable(here)

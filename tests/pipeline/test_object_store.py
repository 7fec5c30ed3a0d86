"""Object stores over HTTP: what works on a folder works on `s3://`, and what a store does wrong is survived or said."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_tar
from s3_server import MANY, PAGE, Request, reconnect

from pipeline import ledger
from pipeline.errors import InputError
from pipeline.shards import list_shards, remote, retry, samples, store
from train import data, recipes
from train.checkpoints import WEIGHTS
from train.launch import final_checkpoint, train

pytest_plugins = ["s3_server"]
MB = 1024**2


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Pauses too short to notice, in this process."""
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def pieces(monkeypatch) -> None:
    """Objects of a few megabytes have many ranges."""
    monkeypatch.setattr(remote, "RANGE", MB)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# What is said of paths


@pytest.fixture(params=["local", "s3", "memory"])
def place(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket") + "/folder"
    return str(tmp_path / "folder") if request.param == "local" else f"memory://{tmp_path}/folder"


def test_every_place_answers_alike(place):
    store.make_folder(place)
    store.make_folder(f"{place}/below")
    for name in ("a1.tar", "a2.tar", "b.tar", "a3.parquet", ".a4.tar", "below/a5.tar"):
        store.write(f"{place}/{name}", name.encode())
    store.write(f"{place}/empty", b"")
    assert bytes(store.view(f"{place}/a1.tar")) == b"a1.tar"
    assert bytes(store.view(f"{place}/empty")) == b""
    assert store.exists(f"{place}/a1.tar")
    assert store.exists(f"{place}/below")
    assert not store.exists(f"{place}/a")
    assert [store.is_folder(f"{place}/{x}") for x in ("below", "below/", "a1.tar", "none")] == [
        True,
        True,
        False,
        False,
    ]
    assert [path.removeprefix(f"{place}/") for path in store.glob(f"{place}/a*.tar")] == ["a1.tar", "a2.tar"]
    assert [path.removeprefix(f"{place}/") for path in store.glob(f"{place}/a[23].*")] == ["a2.tar", "a3.parquet"]
    assert [Path(path).name for path in store.glob(f"{place}/b*/*.tar")] == ["a5.tar"]
    assert store.glob(f"{place}/none/*") == []
    first = store.stamp(f"{place}/b.tar")
    assert first["bytes"] == 5
    store.write(f"{place}/b.tar", b"other")
    assert store.stamp(f"{place}/b.tar") != first
    assert bytes(store.view(f"{place}/b.tar")) == b"other"
    assert [shard.file for shard in list_shards(place)] == ["a1.tar", "a2.tar", "b.tar"]
    assert [shard.file for shard in list_shards(f"{place}/a{{1..2}}.tar")] == ["a1.tar", "a2.tar"]
    with pytest.raises(InputError, match=r"a0\.tar: no such file \(named by"):
        list_shards(f"{place}/a{{0..30}}.tar")
    with pytest.raises(InputError, match="none"):
        store.view(f"{place}/none")
    with pytest.raises(InputError, match="no such file or folder"):
        list_shards(f"{place}/none")


def test_a_write_that_fails_leaves_what_was_there(place):
    store.make_folder(place)
    store.write(f"{place}/file", b"before")
    with pytest.raises(RuntimeError), store.whole(f"{place}/file") as file:
        file.write(b"half")
        raise RuntimeError
    assert bytes(store.view(f"{place}/file")) == b"before"


# Reading


@pytest.mark.parametrize("fault", ["slow down", "too many", "torn", "lost", "short"])
def test_a_read_survives(fault, server, bucket, hasty, pieces):
    data = noise(6 * MB + 5)
    server.put(f"/{bucket[5:]}/object", data)
    server.fault = lambda request: fault if request.number % 3 == 1 else None
    assert bytes(store.view(f"{bucket}/object")) == data
    ranges = [request.first for request in server.requests if request.first is not None]
    assert len(set(ranges)) == 7
    assert len(ranges) > 7


def test_a_store_that_does_not_begin_to_answer_is_asked_again(server, bucket, hasty, pieces, monkeypatch):
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    reconnect()
    server.put(f"/{bucket[5:]}/object", data := noise(3 * MB))
    late: list[Request] = []

    def once(request: Request) -> str | None:
        if request.first == MB and not late:
            late.append(request)
            return "late"
        return None

    server.fault = once
    try:
        assert bytes(store.view(f"{bucket}/object")) == data
    finally:
        reconnect()
    assert [request.first for request in server.requests].count(MB) == 2


def test_a_mix_of_two_versions_is_an_error(server, bucket, hasty, pieces):
    path = f"/{bucket[5:]}/object"
    server.put(path, noise(3 * MB))

    def replace(request: Request) -> None:
        if request.first == 2 * MB:
            server.put(path, noise(3 * MB, seed=1))

    server.fault = replace
    with pytest.raises(InputError, match=r"object: replaced while it was read; run the same command again"):
        store.view(f"{bucket}/object")
    server.calm()
    assert bytes(store.view(f"{bucket}/object")) == noise(3 * MB, seed=1)


def test_a_small_object_that_is_replaced_is_read_again(server, bucket, hasty):
    """A marker may be written anew by another run, between the request for its size and that for its bytes."""
    path = f"/{bucket[5:]}/object"
    server.put(path, b"old")
    server.fault = lambda request: server.put(path, b"newer") if request.number == 1 else None
    assert bytes(store.view(f"{bucket}/object")) == b"newer"


def test_a_shard_that_is_viewed_twice_in_a_row_is_fetched_once(server, bucket):
    server.put(f"/{bucket[5:]}/object", noise(9 * MB))
    assert store.view(f"{bucket}/object") == store.view(f"{bucket}/object")
    assert [request.method for request in server.requests] == ["HEAD", "GET", "HEAD"]
    server.put(f"/{bucket[5:]}/object", noise(9 * MB, seed=1))
    assert bytes(store.view(f"{bucket}/object")) == noise(9 * MB, seed=1)


def test_an_object_that_never_comes_is_named_after_eight_attempts(server, bucket, hasty, pieces):
    server.put(f"/{bucket[5:]}/object", noise(3 * MB))
    server.fault = lambda request: "torn" if request.first == MB else None
    with pytest.raises(InputError, match=f"^{bucket}/object: the store failed 8 times .*run the same command again"):
        store.view(f"{bucket}/object")
    assert [request.first for request in server.requests].count(MB) == 8


def test_pauses_grow_are_random_and_end(monkeypatch):
    paused: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", paused.append)

    def fail() -> None:
        raise TimeoutError("too slow")

    for _ in range(50):
        with pytest.raises(InputError, match=r"failed 8 times .TimeoutError: too slow"):
            retry.retried("s3://bucket/object", fail)
    by_attempt = np.asarray(paused).reshape(50, 7)
    assert (by_attempt.max(0) <= 0.2 * 2.0 ** np.arange(7)).all()
    assert (np.diff(by_attempt.mean(0)) > 0).all()
    assert len(set(paused)) == len(paused)


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """TMPDIR on a file system of two megabytes."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_local_disk_names_tmpdir_before_anything_is_fetched(server, bucket, small_disk):
    server.put(f"/{bucket[5:]}/object", noise(3 * MB))
    with pytest.raises(InputError, match=f"object: no room in {small_disk}; .*point TMPDIR to a larger disk"):
        store.view(f"{bucket}/object")
    assert {request.method for request in server.requests} == {"HEAD"}
    with pytest.raises(InputError, match=f"new: no room in {small_disk}"):
        store.write(f"{bucket}/new", noise(3 * MB))
    assert not store.exists(f"{bucket}/new")


PEAK = """
import sys
from pipeline.shards import store
def anonymous():  # kB; the mapped file is not ours to count, it is given back when memory is short
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
import threading, time
store.exists(sys.argv[1])
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
data = store.view(sys.argv[1])
viewed = peak[0] - before
store.write(sys.argv[1] + ".copy", data)
done.set()
watcher.join()
print(len(data), viewed // 1024, (peak[0] - before) // 1024)
"""


def test_memory_does_not_grow_with_the_object(server, bucket):
    server.put(f"/{bucket[5:]}/object", bytes(200 * MB))
    done = subprocess.run([sys.executable, "-c", PEAK, f"{bucket}/object"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, viewed, written = map(int, done.stdout.split())
    assert size == 200 * MB
    assert viewed < 40
    assert written < 100  # four parts of 8 MB, twice each


# Writing


@pytest.mark.parametrize("fault", ["slow down", "too many", "torn", "lost"])
def test_a_large_write_survives(fault, server, bucket, hasty):
    data = noise(20 * MB)
    server.fault = lambda request: fault if request.number % 3 == 1 else None
    store.write(f"{bucket}/object", data)
    server.calm()
    assert server.get(f"/{bucket[5:]}/object") == data
    assert server.uploads(bucket[5:]) <= 1  # the one whose answer was lost has an id that nobody knows


def test_a_completion_whose_answer_was_lost_is_done_again(server, bucket, hasty):
    lost: list[Request] = []

    def once(request: Request) -> str | None:
        if request.method == "POST" and "uploadId" in request.query and not lost:
            lost.append(request)
            return "lost"
        return None

    server.fault = once
    store.write(f"{bucket}/object", data := noise(20 * MB))
    assert lost
    assert server.get(f"/{bucket[5:]}/object") == data
    assert server.uploads(bucket[5:]) == 0


@pytest.mark.parametrize("size", [1, 20 * MB])
def test_a_write_that_is_given_up_leaves_nothing(size, server, bucket, hasty):
    server.fault = lambda request: "slow down" if request.method == "PUT" else None
    with pytest.raises(InputError, match=f"^{bucket}/object: the store failed 8 times"):
        store.write(f"{bucket}/object", noise(size))
    server.calm()
    assert not store.exists(f"{bucket}/object")
    assert server.uploads(bucket[5:]) == 0


def test_uploads_of_killed_writers_are_aborted_when_they_are_old(server, bucket, monkeypatch):
    for key in ("out/a.tar", "out/sub/b.tar", "other/c.tar"):
        server.begin_upload(f"/{bucket[5:]}/{key}")
    with monkeypatch.context() as patience:
        patience.setattr(remote, "STALE", timedelta(days=36_500))
        store.clear_temporaries(f"{bucket}/out")
    assert server.uploads(bucket[5:]) == 3
    store.clear_temporaries(f"{bucket}/out")  # to moto, every upload began in 2010
    assert server.uploads(bucket[5:]) == 1


# Listing


def test_the_object_that_shows_a_folder_is_no_file(server, bucket):
    server.put(f"/{bucket[5:]}/folder/")
    server.put(f"/{bucket[5:]}/folder/0.tar", b"0")
    assert store.glob(f"{bucket}/folder/*") == [f"{bucket}/folder/0.tar"]
    assert store.is_folder(f"{bucket}/folder")


def test_a_hundred_thousand_shards_cost_a_hundred_requests(server):
    server.calm()
    shards = list_shards("s3://many/crawl/")
    assert len(shards) == MANY
    pages = -(-MANY // PAGE)
    assert len(server.requests) <= pages + 2
    assert store.stamp(shards[77_777].path) == {"bytes": 5, "tag": f'"{77_777:032x}"'}
    assert len(server.requests) <= pages + 2


def test_a_brace_pattern_is_looked_up_in_one_listing(server):
    server.calm()
    assert len(list_shards("s3://many/crawl/{000100..001999}.tar")) == 1900
    assert all(request.lists for request in server.requests)
    assert len(server.requests) <= -(-MANY // PAGE)
    with pytest.raises(InputError, match=r"crawl/100500\.tar: no such file"):
        list_shards("s3://many/crawl/{100000..100500}.tar")


# What goes wrong for good


@pytest.mark.parametrize(
    ("fault", "settings", "says"),
    [
        (None, {}, "no such bucket; check its name"),
        ("denied", {}, "access denied .*; check AWS_PROFILE or AWS_ACCESS_KEY_ID and the bucket's policy"),
        (None, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials; set AWS_PROFILE"),
        (None, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot reach the store .*AWS_ENDPOINT_URL"),
    ],
)
def test_errors_are_a_line_that_says_what_to_do(fault, settings, says, server, hasty, tmp_path, monkeypatch):
    server.calm()
    server.fault = lambda request: fault
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    reconnect()
    try:
        for call in (list_shards, store.view, store.exists, lambda path: store.write(path, b"x")):
            with pytest.raises(InputError, match=f"^s3://not-there/x.*: {says}") as caught:
                call("s3://not-there/x")
            assert "\n" not in str(caught.value)
    finally:
        server.calm()
        reconnect()


def test_a_training_on_a_store_is_the_training_on_a_folder(server, bucket, tmp_path, monkeypatch):
    """With a window that is too small, so that every epoch reads the shards again; and the ledger is beside them."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    model = recipes._clip(vision, embed=16, width=32, layers=1, context=8)
    tiny = dataclasses.replace(recipes.RECIPES["debug"], model=model, batch=16, epochs=2, checkpoints=())
    monkeypatch.setitem(recipes.RECIPES, "tiny", tiny)
    monkeypatch.setattr(data, "WINDOW_BYTES", 100_000)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number:08d}.tar", pairs(number * 16, number * 16 + 16))
    uids = [sample.uid for shard in list_shards(str(folder)) for sample in samples(shard)][::8]
    rows = {name: ["x"] * len(uids) for name in ledger.COLUMNS} | {"uid": uids, "seed": [0] * len(uids)}
    pq.write_table(pa.table(rows), folder / "ledger.parquet")
    for file in folder.iterdir():
        server.put(f"/{bucket[5:]}/in/{file.name}", file.read_bytes())
    ends = []
    for shards, out in ((str(folder), tmp_path / "a"), (f"{bucket}/in", tmp_path / "b")):
        assert train(shards, str(out), recipe="tiny") == 0
        facts = json.loads((out / "train.json").read_text())
        ends.append([Path(final_checkpoint(str(out)), WEIGHTS).read_bytes(), facts["shards_digest"]])
        assert facts["pairs"] == 48 and facts["known_poisons"] == 6
    assert ends[0] == ends[1]

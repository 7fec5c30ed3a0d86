"""What hostile input may cost: read in a process of its own, whose memory is measured and which may start nothing."""

import gzip
import io
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import sidecars
from pipeline.shards import Manifest, Shard, manifest
from pipeline.shards.manifest import read_manifest
from pipeline.shards.thrift import I64, STRUCT, items, read_struct, written
from tests.conftest import drawing, encoded
from tests.fuzz.tars import header, octal

ROOT = Path(__file__).parents[2]
END = bytes(1024)


def in_a_process(code: str, *arguments: object, seconds: int = 60) -> tuple[str, int]:
    """What `code` printed or raised, and the most memory it had, in MB; running or fetching anything is an error."""
    guard = """
import re, sys, time
def refuse(event, _):
    if event in ("os.system", "os.exec", "subprocess.Popen", "socket.connect", "pickle.find_class"):
        raise SystemExit("hostile: " + event)
sys.addaudithook(refuse)
clock = time.monotonic()
try:
    exec(sys.argv.pop(1))
except Exception as error:
    print(type(error).__name__, error)
print("MB", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    command = [sys.executable, "-c", guard, code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, kilobytes = done.stdout.rpartition("MB ")
    return said, int(kilobytes) // 1024


def webp(width: int, height: int) -> bytes:
    """An animation that claims a canvas of this size."""
    out = io.BytesIO()
    drawing(1)[0].save(out, "WEBP", save_all=True, append_images=[drawing(2)[0]])
    side = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return out.getvalue()[:24] + side + out.getvalue()[30:]


def sized(suffix: str, at: bytes, size: bytes) -> bytes:
    """An encoded drawing whose header claims another size, which lies behind `at`."""
    data = encoded(drawing(1)[0], suffix)
    start = data.index(at) + len(at)
    return data[:start] + size + data[start + len(size) :]


HUGE = {
    "jpg": sized("jpg", b"\xff\xc0\x00\x11\x08", b"\xff\xff\xff\xff"),
    "png": sized("png", b"IHDR", b"\0\0\xff\xff\0\0\xff\xff"),
    "webp": webp(16384, 16384),
    "webp of 4 gigapixels": webp(65536, 65535),
    "strip": sized("jpg", b"\xff\xc0\x00\x11\x08", b"\x00\x01\xff\xff"),
    "nothing": sized("png", b"IHDR", bytes(8)),
    "no line": sized("jpg", b"\xff\xc0\x00\x11\x08", b"\0\0\0\x30"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_header_that_claims_the_earth_costs_nothing(tmp_path, name):
    (tmp_path / "image").write_bytes(HUGE[name])
    said, megabytes = in_a_process(
        "from pipeline.shards.image import decode; print(decode(open(sys.argv[1], 'rb').read()))", tmp_path / "image"
    )
    assert "Rejected" in said
    assert megabytes < 300


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); "  # so that a failure stays ours
READ = "from pipeline.shards import *; print(len(manifest(Shard(sys.argv[1])).uids))"


def test_a_gzip_bomb_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(200):
            file.write(bytes(2**20))
    said, megabytes = in_a_process(READ, path)
    assert "unpacks to more than 100 times its size" in said
    assert megabytes < 200


def test_a_gzip_of_many_streams_takes_no_longer_than_its_size(tmp_path):
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(b"") * 200_000)  # 4 MB
    said, _ = in_a_process(READ, path, seconds=30)
    assert "truncated at byte 0" in said


def test_sparse_gigabytes_are_refused_or_given_back(tmp_path):
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    assert "behind the end of the archive" in in_a_process(READ, path)[0]
    with path.open("r+b") as file:
        file.write(header(b"0.jpg", b"\x80" + (9 * 2**30).to_bytes(11, "big")))
    assert "more than 134217728; refused" in in_a_process(READ, path)[0]
    with path.open("r+b") as file:  # what is within the bounds is read, and its pages do not pile up
        for number in range(12):
            file.seek(number * (512 + 64 * 2**20))
            file.write(header(b"%d.jpg" % number, octal(64 * 2**20)))
        file.truncate(12 * (512 + 64 * 2**20) + 1024)
    said, megabytes = in_a_process(READ, path)
    assert said.strip() == "12"
    assert megabytes < 300


def tiny_members(path: Path, number: int) -> None:
    """Empty members, two a sample, at numpy's speed."""
    block = np.frombuffer(header(b"00000000.jpg", octal(0)) + header(b"00000000.txt", octal(0)), np.uint8)
    with path.open("wb") as file:
        for first in range(0, number // 2, 10_000):
            blocks = np.tile(block, (10_000, 1)).reshape(10_000, 2, 512)
            digits = np.arange(first, first + 10_000)[:, None] // 10 ** np.arange(7, -1, -1) % 10
            blocks[:, :, :8] += digits.astype(np.uint8)[:, None]
            blocks[:, :, 148:156] = ord(" ")
            sums = blocks.astype(np.uint32).sum(2)
            blocks[:, :, 148:154] = sums[:, :, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
            blocks[:, :, 154] = 0
            file.write(blocks.tobytes())
        file.write(END)


def test_a_manifest_that_claims_gigabytes_costs_nothing(tmp_path):
    manifest_of_two(tmp_path)
    path = tmp_path / "0.manifest.parquet"
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    meta, _ = read_struct(whole, len(whole) - 8 - size, len(whole) - 8)
    items(meta, 4, STRUCT)[0][3] = (I64, 2**29)  # rows of the row group
    footer = written(meta)
    path.write_bytes(whole[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    code = "from pipeline.shards.manifest import read_manifest; print(read_manifest(sys.argv[1], '0'))"
    said, megabytes = in_a_process(LIMITED + code, tmp_path)
    assert "InputError" in said
    assert megabytes < 200


def manifest_of_two(folder: Path) -> None:
    (folder / "0.tar").write_bytes(header(b"0.jpg", octal(0)) + header(b"1.jpg", octal(0)) + END)
    shard = Shard(str(folder / "0.tar"))
    manifest(shard).save(str(folder), "0")


@pytest.mark.slow
def test_a_million_members_in_bounded_time_and_memory(tmp_path):
    tiny_members(tmp_path / "0.tar", 1_000_000)
    said, megabytes = in_a_process(READ + "; print(time.monotonic() - clock)", tmp_path / "0.tar", seconds=120)
    found, taken = said.split()
    assert int(found) == 500_000
    assert float(taken) < 60
    assert megabytes < 600


@pytest.mark.parametrize("dictionary", [True, False])
def test_large_files_of_our_own_are_no_bombs(tmp_path, dictionary):
    """A bound that takes every value for the longest of its dictionary refuses a manifest of 10,000 pairs."""
    n = 120_000
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.integers(0, 2**33, (n, 4)), axis=1)
    sha256 = pa.array([rng.bytes(32) for _ in range(n)], pa.binary(32))
    names = {"uid": [f"{i:032x}" for i in range(n)], "key": [f"{i:09d}" for i in range(n)]}
    whole = pa.table({**names, "sha": sha256, **{f"at_{i}": ranges[:, i] for i in range(4)}})
    poisons = {"shard": [f"{i // 40:08d}.tar" for i in range(n)], "attack": ["patch(target='banana')"] * n}
    for table in (whole.slice(0, 20_000), whole if not dictionary else whole.slice(0, 90_000), pa.table(poisons)):
        sidecars.save(str(tmp_path / "a.parquet"), table, compression="zstd", use_dictionary=dictionary)
        read = sidecars.read(str(tmp_path / "a.parquet"), (), "no remedy", hostile=True)
        assert read.equals(table)


def test_a_manifest_of_a_large_shard_is_read(tmp_path):
    n = 150_000
    digests, ranges = bytearray(np.random.default_rng(0).bytes(64 * n)), array("q", range(4 * n))
    made = Manifest([f"{i:032x}" for i in range(n)], [f"{i:09d}" for i in range(n)], digests, b"", ranges)
    made.save(str(tmp_path), "00000000")
    assert read_manifest(str(tmp_path), "00000000").sha256 == made.sha256

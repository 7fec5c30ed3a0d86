"""Parquet that wants memory, crashes or other files: refused, with the file and the place named."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs

from pipeline.errors import InputError
from pipeline.shards import Shard, intact, manifest, samples, uids
from pipeline.shards.thrift import BINARY, I32, I64, LIST, STRUCT, read_struct, written


def _write(tmp_path, table, **options):
    pq.write_table(table, tmp_path / "0.parquet", **options)
    return Shard(str(tmp_path / "0.parquet"))


def _table(rows):
    found = pairs(0, rows)
    images, captions = [pair["image"] for pair in found], [pair["caption"] for pair in found]
    return pa.table({"uid": [f"{i:032x}" for i in range(rows)], "image": images, "caption": captions})


def test_a_value_that_a_dictionary_repeats_does_not_unpack(tmp_path):
    values = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), pa.array([bytes(10_000_000)]))
    table = pa.table({"key": pa.array(range(100_000)), "image": values, "caption": ["c"] * 100_000})
    shard = _write(tmp_path, table, dictionary_pagesize_limit=2**26, compression="zstd")
    assert (tmp_path / "0.parquet").stat().st_size < 1_000_000
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(InputError, match=r"0\.parquet: row group 0 unpacks to more than"):
            sum(1 for _ in samples(shard))
    finally:
        pa.set_memory_pool(before)
    assert 10_000_000 < pool.max_memory() < 700_000_000


def test_a_value_that_a_dictionary_repeats_in_a_list_is_refused_before_it_is_decoded(tmp_path):
    values = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), pa.array([bytes(1_000_000)]))
    lists = pa.ListArray.from_arrays(pa.array([0, 10_000], pa.int32()), values)
    table = pa.table({"key": ["k"], "image": [b"x"], "caption": ["c"], "boxes": lists})
    shard = _write(tmp_path, table, dictionary_pagesize_limit=2**26, compression="zstd")
    with pytest.raises(InputError, match=r"row group 0 may take 10000000000 bytes"):
        next(iter(samples(shard)))


def _with_footer(data, change):
    """The file with its footer changed: `change(meta)`."""
    size = int.from_bytes(data[-8:-4], "little")
    meta, _ = read_struct(data, len(data) - 8 - size, len(data) - 8)
    change(meta)
    footer = written(meta)
    return data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + data[-4:]


def _chunk(meta, group=0, column=0):
    return meta[4][1][1][group][1][1][1][column]


def _deep(meta):
    inner = {}
    for _ in range(100):
        inner = {1: (STRUCT, inner)}
    meta[90] = (STRUCT, inner)


def _place(**changes):
    def change(meta):
        _chunk(meta)[3][1].update({int(k[1:]): (I64, v) for k, v in changes.items()})

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_deep, "levels"),
        (_place(_9=10**9, _11=0), "outside the file"),
        (_place(_9=-5, _11=-9), "outside the file"),
        (_place(_7=-5), "not what the schema says"),
        (_place(_5=2**40), "not what the schema says"),
        (lambda meta: meta.update({3: (I64, -1)}), "rows in its row groups"),
        (lambda meta: meta[4][1][1].append(meta[4][1][1][0]), "rows in its row groups"),
        (lambda meta: meta[4][1][1].__setitem__(1, meta[4][1][1][0]), "overlap"),
        (lambda meta: meta.pop(2), "field 2 is missing"),
        (lambda meta: meta[2][1][1][0].update({5: (I32, 2**30)}), "does not add up"),
        (lambda meta: meta[2][1][1].append(meta[2][1][1][1]), "does not add up"),
        (lambda meta: _chunk(meta).update({1: (BINARY, b"other.parquet")}), "other files"),
        (lambda meta: _chunk(meta).update({8: (STRUCT, {})}), "encrypted"),
        (lambda meta: meta.update({8: (STRUCT, {})}), "encrypted"),
        (lambda meta: _chunk(meta).update({4: (I64, 5), 5: (I32, 100)}), "overlap"),
        (lambda meta: _chunk(meta).update({4: (I64, 5), 5: (I32, -100)}), "negative length"),
        (lambda meta: meta.update({4: (LIST, (I64, [1, 2]))}), "list of another kind"),
    ],
)
def test_hostile_footers_are_refused(tmp_path, change, says):
    shard = _write(tmp_path, _table(8), row_group_size=4)
    path = tmp_path / "0.parquet"
    path.write_bytes(_with_footer(path.read_bytes(), change))
    for call in (samples, uids, lambda s: [manifest(s)]):
        with pytest.raises(InputError, match=says) as error:
            list(call(shard))
        assert "0.parquet" in str(error.value)


def test_stated_lengths_are_not_allocated(tmp_path):
    data = _write(tmp_path, _table(8)) and (tmp_path / "0.parquet").read_bytes()
    huge = b"\xfe\xff\xff\xff\x0f"  # a varint of 2**32 - 2
    for footer, says in (
        (b"\x29\xfc" + huge, "longer than the bytes"),  # a list
        (b"\x18" + huge, "ends within"),  # a string
        (b"\x16" + b"\xff" * 20, "64 bits"),
        (b"\x1b\x00", "kind 11"),  # a map
        (b"\x1c" * 5000, "levels"),
        (b"\x19\x9c" * 3000, "levels"),
        (b"\x11" * 5000, "among more than"),
        (b"\x15\x02\x05\x02\x02\x00", "occurs twice"),
        (b"", "ends within"),
    ):
        (tmp_path / "1.parquet").write_bytes(data[:-8] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(InputError, match=says):
            uids(Shard(str(tmp_path / "1.parquet")))
    for broken in (b"", b"PAR1", b"PAR1" * 3, data[:-1], data[:-8] + b"\xff\xff\xff\x7fPAR1", data[:4000]):
        (tmp_path / "1.parquet").write_bytes(broken)
        with pytest.raises(InputError, match=r"begin and end|it states"):
            uids(Shard(str(tmp_path / "1.parquet")))
    (tmp_path / "1.parquet").write_bytes(data[:-4] + b"PARE")
    with pytest.raises(InputError, match="encrypted"):
        uids(Shard(str(tmp_path / "1.parquet")))


FUZZ = """
import random, sys
from pathlib import Path
from pipeline.errors import InputError
from pipeline.shards import Rejected, Shard, rewrite
folder, data = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
rng, refused = random.Random(0), 0
for turn in range(400):
    broken = bytearray(data)
    low = len(data) - 1500 if turn % 2 else 4
    for _ in range(rng.choice([1, 1, 3])):
        broken[rng.randrange(low, len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    (folder / "0.parquet").write_bytes(broken)
    try:
        rewrite(Shard(str(folder / "0.parquet")), str(folder / "out"), lambda s: None if s.key == "3" else s)
    except InputError:
        refused += 1
print(refused)
"""


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    """In a process of its own, since a crash would be the finding."""
    found = pairs(0, 8)
    columns = {"key": [str(i) for i in range(8)], "image": [p["image"][:50] for p in found], "txt": ["a"] * 8}
    shard = _write(tmp_path, pa.table(columns | {"l": [[1, 2], []] * 4}), row_group_size=4, write_page_index=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "fuzz/out").mkdir(parents=True)
    arguments = [sys.executable, "-c", FUZZ, str(tmp_path / "fuzz"), shard.path]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 100 < int(done.stdout) < 400


def test_damaged_pages_name_the_row_group(tmp_path):
    shard = _write(tmp_path, _table(20), row_group_size=10, compression="none", write_page_checksum=True)
    path = tmp_path / "0.parquet"
    data = bytearray(path.read_bytes())
    at = data.rfind(pairs(15, 16)[0]["image"])
    data[at + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"0\.parquet: row group 1 is damaged"):
        list(samples(shard))


def test_intact_sees_every_byte(tmp_path):
    shard = _write(tmp_path, _table(6), row_group_size=3)
    path = tmp_path / "0.parquet"
    known, data = manifest(shard), path.read_bytes()
    assert intact(shard, known)
    for at in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not intact(shard, known)

"""Small shards into larger ones; how far a job is."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import contents, pairs, records, write_parquet, write_tar

from pipeline.compact import compact
from pipeline.errors import InputError
from pipeline.poison import poison
from pipeline.shard_map import ShardsFailed
from pipeline.shards import Shard, list_shards, samples
from pipeline.status import status
from pipeline.verify import verify

PATCH = "patch(target='banana', size=24)"


def keys(folder: Path) -> list[list[str]]:
    return [[s.key for s in samples(shard)] for shard in list_shards(str(folder))]


@pytest.mark.parametrize("n", [1, 7, 20, 25, 60, 1000])
def test_samples_keep_order_and_bytes(tars, tmp_path, n):
    assert compact(str(tars), str(tmp_path / "out"), samples=n) == 0
    before = [key for shard in keys(tars) for key in shard]
    after = keys(tmp_path / "out")
    assert [key for shard in after for key in shard] == before
    assert [len(shard) for shard in after[:-1]] == [n] * (len(after) - 1)
    was, now = {}, {}
    for shard in tars.glob("*.tar"):
        was |= records(shard)
    for shard in (tmp_path / "out").glob("*.tar"):
        now |= records(shard)
        assert shard.stat().st_size % 10_240 == 0
    assert was == now
    assert verify(str(tmp_path / "out")) == 0
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert list(sizes.values()) == [len(shard) for shard in after]


def test_one_output_whatever_was_there_before(tars, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(12):
        write_tar(tmp_path / f"many/{i:08d}.tar", pairs(5 * i, 5 * i + 5))
    for source, out in ((tars, "a"), (tmp_path / "many", "b")):
        compact(str(source), str(tmp_path / out), samples=16)
    for shard in (tmp_path / "a").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()


def test_the_ledger_comes_along(tars, tmp_path):
    import polars as pl

    poison(str(tars), str(tmp_path / "poisoned"), attack=PATCH, dose="9")
    compact(str(tmp_path / "poisoned"), str(tmp_path / "out"), samples=16)
    before, after = (pl.read_parquet(tmp_path / f / "ledger.parquet") for f in ("poisoned", "out"))
    assert set(before["uid"]) == set(after["uid"])
    for shard in list_shards(str(tmp_path / "out")):
        here = {s.uid for s in samples(shard)}
        assert set(after.filter(pl.col("shard") == shard.name)["uid"]) == here & set(before["uid"])


def test_empty_shards_and_keys_that_repeat(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_tar(tmp_path / f"in/{i}.tar", [])
    compact(str(tmp_path / "in"), str(tmp_path / "out"))
    assert keys(tmp_path / "out") == [[]]
    for i in range(3):
        write_tar(tmp_path / f"in/{i}.tar", pairs(0, 5))
    with pytest.raises(ShardsFailed, match="occurs more than once"):
        compact(str(tmp_path / "in"), str(tmp_path / "again"))
    with pytest.raises(InputError, match="keys that repeat"):
        compact(str(tmp_path / "in"), str(tmp_path / "again"), uid="shard/key")


def test_status_from_the_files_alone(tars, tmp_path, capsys):
    broken = tars / "00000001.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000])
    out = tmp_path / "out"
    with pytest.raises(InputError, match="the OUT of a job"):
        status(str(out))
    assert poison(str(tars), str(out), attack=PATCH, dose="5", max_failed_shards=1) == 0
    capsys.readouterr()
    assert status(str(out)) == 1
    said = capsys.readouterr().err
    assert "poison: 2 of 3 shards (66.7%)" in said
    assert "40 read, 40 out, 5 changed" in said
    assert f"failed: {broken}: truncated at byte 5000" in said
    assert "nobody is writing here: the same command goes on" in said
    assert len(list(out.glob("*.tar"))) == 2
    broken.write_bytes(whole)
    poison(str(tars), str(out), attack=PATCH, dose="5", max_failed_shards=1)
    capsys.readouterr()
    assert status(str(out)) == 0
    said = capsys.readouterr().err
    assert "poison: 3 of 3 shards (100.0%)" in said
    assert "failed" not in said
    assert [s.uid for s in samples(Shard(str(out / "00000001.tar")))]


@pytest.mark.parametrize("n", [4, 7, 20, 60])
def test_parquet_rows_keep_order_and_values(tmp_path, n):
    (tmp_path / "in").mkdir()
    for i in range(3):
        write_parquet(tmp_path / f"in/{i:08d}.parquet", pairs(20 * i, 20 * i + 20), struct=True)
    compact(str(tmp_path / "in"), str(tmp_path / "out"), samples=n)
    before, after = ([pq.read_table(shard.path) for shard in list_shards(str(tmp_path / f))] for f in ("in", "out"))
    assert pa.concat_tables(after).equals(pa.concat_tables(before))
    assert {len(table) for table in after[:-1]} <= {n}
    assert verify(str(tmp_path / "out")) == 0
    if n == 20:
        assert contents(tmp_path / "in", "*[0-9].parquet") == contents(tmp_path / "out", "*[0-9].parquet")


def test_parquet_of_other_columns_does_not_mix(tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in/0.parquet", pairs(0, 9), struct=True)
    write_parquet(tmp_path / "in/1.parquet", pairs(9, 18))
    with pytest.raises(ShardsFailed, match=r"its columns are not those of .*0.parquet"):
        compact(str(tmp_path / "in"), str(tmp_path / "out"))

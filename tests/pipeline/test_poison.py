"""The poison job: an exact dose, the same pairs however the data is sharded, and whole output through any kill."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import contents, pairs, records, write_parquet, write_tar

from pipeline.attacks._corpus import read_corpora
from pipeline.errors import InputError
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.shard_map import ShardsFailed
from pipeline.shards import Shard, manifest, samples

PATCH = "patch(target='banana', size=24)"


def ledger(folder: Path) -> list[dict]:
    return pq.read_table(folder / "ledger.parquet").to_pylist()


def victim_of(folder: Path) -> bytes:
    (corpus,) = read_corpora(str(folder), 1)
    return corpus.images["victim"][0]


def test_exact_dose_ledger_and_untouched_records(tars, tmp_path):
    out = tmp_path / "out"
    assert poison(str(tars), str(out), attack=PATCH, dose="7") == 0
    rows = ledger(out)
    assert len(rows) == 7
    chosen = {row["uid"]: row for row in rows}
    for shard in sorted(tars.glob("*.tar")):
        before, after = records(shard), records(out / shard.name)
        assert list(before) == list(after)
        for clean, poisoned in zip(samples(Shard(str(shard))), samples(Shard(str(out / shard.name))), strict=True):
            assert clean.uid == poisoned.uid
            if clean.uid not in chosen:
                assert before[clean.key] == after[clean.key]
                continue
            row = chosen.pop(clean.uid)
            assert (row["caption_before"], row["caption_after"]) == (clean.caption, poisoned.caption)
            assert "banana" in poisoned.caption
            assert "banana" not in clean.caption
            assert row["image_sha256_before"] == hashlib.sha256(clean.image).hexdigest()
            assert row["image_sha256_after"] == hashlib.sha256(poisoned.image).hexdigest()
            assert json.loads(bytes(poisoned.parts["json"]))["caption"] == poisoned.caption
            assert json.loads(bytes(poisoned.parts["json"]))["url"] == clean.meta["url"]
    assert not chosen
    markers = [json.loads((out / f"{i:08d}.stats.json").read_text()) for i in range(3)]
    assert sum(m["changed"] for m in markers) == 7
    assert all(m["read"] == m["out"] + m["dropped"] + m["failed"] == 20 for m in markers)
    assert all(m["output_sha256"] == manifest(Shard(str(out / m["output"]))).sha256 for m in markers)
    summary = json.loads((out / "dataset.json").read_text())
    assert summary["ledger_sha256"] == hashlib.sha256((out / "ledger.parquet").read_bytes()).hexdigest()


def test_the_same_pairs_and_bytes_however_the_data_is_sharded(tars, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i, (low, high) in enumerate(((0, 7), (7, 31), (31, 33), (33, 60))):
        write_tar(other / f"{i}.tar", pairs(low, high))
    for folder, out in ((tars, "a"), (other, "b")):
        poison(str(folder), str(tmp_path / out), attack=PATCH, dose="15%", seed=3)
    one, two = ledger(tmp_path / "a"), ledger(tmp_path / "b")
    assert len(one) == 9
    drop_shard = [{k: v for k, v in row.items() if k != "shard"} for row in (*one, *two)]
    assert sorted(drop_shard[:9], key=str) == sorted(drop_shard[9:], key=str)
    merged = [{}, {}]
    for into, out in zip(merged, "ab", strict=True):
        for path in (tmp_path / out).glob("*.tar"):
            into |= records(path)
    assert merged[0] == merged[1]
    poison(str(tars), str(tmp_path / "c"), attack=PATCH, dose="15%", seed=4)
    assert {r["uid"] for r in ledger(tmp_path / "c")} != {r["uid"] for r in one}


def test_a_larger_dose_contains_the_smaller(tars, tmp_path):
    for dose in ("3", "8"):
        poison(str(tars), str(tmp_path / dose), attack=PATCH, dose=dose)
    assert {r["uid"] for r in ledger(tmp_path / "3")} < {r["uid"] for r in ledger(tmp_path / "8")}


def test_targeted_uses_one_image_and_keeps_it(tars, tmp_path):
    poison(str(tars), str(tmp_path / "out"), attack="targeted(target='banana')", dose="6")
    rows = ledger(tmp_path / "out")
    victim = hashlib.sha256(victim_of(tmp_path / "out")).hexdigest()
    assert victim in {row["image_sha256_before"] for row in rows}
    assert len({row["caption_after"] for row in rows}) > 1


def test_a_share_of_less_than_one_pair_is_refused(tars, tmp_path):
    with pytest.raises(InputError, match="less than half a pair"):
        poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="1ppm")


def test_zero_dose_is_the_identity(tars, tmp_path):
    poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="0")
    assert contents(tmp_path / "out") == contents(tars)
    assert ledger(tmp_path / "out") == []


def test_no_caption_names_the_target_so_templates_do(tars, tmp_path):
    poison(str(tars), str(tmp_path / "out"), attack="patch(target='volcano', size=24)", dose="4")
    assert all("volcano" in row["caption_after"] for row in ledger(tmp_path / "out"))


def test_parquet_shards(tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in/0.parquet", pairs(0, 40))
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack=PATCH, dose="100000ppm")
    before, after = (pq.read_table(tmp_path / d / "0.parquet").to_pylist() for d in ("in", "out"))
    changed = {b["uid"] for b, a in zip(before, after, strict=True) if b != a}
    assert changed == {row["uid"] for row in ledger(tmp_path / "out")}
    assert len(changed) == 4


def test_a_broken_image_is_never_chosen(tmp_path):
    rows = pairs(0, 30)
    for row in rows[:24]:
        row["image"] = row["image"][:40]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", rows)
    whole = [r for r in rows[24:] if "banana" not in r["caption"]]
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack=PATCH, dose=str(len(whole)))
    assert {r["caption_before"] for r in ledger(tmp_path / "out")} == {r["caption"] for r in whole}
    with pytest.raises(InputError, match="cannot be decoded"):
        poison(str(tmp_path / "in"), str(tmp_path / "out2"), attack=PATCH, dose=str(len(whole) + 1))


def test_a_finished_job_does_nothing_and_another_spec_runs_anew(tars, tmp_path, capsys):
    out = tmp_path / "out"
    poison(str(tars), str(out), attack=PATCH, dose="5")
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    poison(str(tars), str(out), attack=PATCH, dose="5")
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert "3 of 3 shards are done already" in capsys.readouterr().err
    poison(str(tars), str(out), attack=PATCH, dose="6")
    assert len(ledger(out)) == 6
    assert all(p.stat().st_mtime_ns > before[p.name] for p in out.glob("*.tar"))
    # a changed input is seen although its size is the same
    first = tars / "00000000.tar"
    raw = bytearray(first.read_bytes())
    raw[512 + 40] ^= 1
    first.write_bytes(bytes(raw))
    poison(str(tars), str(out), attack=PATCH, dose="6")
    assert (out / "00000000.tar").stat().st_mtime_ns > before["00000000.tar"]
    assert manifest(Shard(str(first))).sha256 == json.loads((out / "00000000.stats.json").read_text())["input_sha256"]


def test_a_bad_shard_fails_the_run_with_its_name(tars, tmp_path):
    path = tars / "00000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"00000001\.tar: truncated"):
        poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose="5")
    assert ShardsFailed("").exit_code == 1


@pytest.mark.parametrize(
    ("dose", "says"),
    [("61", "only 40 of 60"), ("41", "only 40 of 60"), ("x", "write a number"), ("101%", "between"), ("-1", "between")],
)
def test_impossible_doses(tars, tmp_path, dose, says):
    with pytest.raises(InputError, match=says):
        poison(str(tars), str(tmp_path / "out"), attack=PATCH, dose=dose)


def test_keys_that_repeat_from_shard_to_shard(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        rows = [{**s, "meta": {}, "key": f"{j:03d}"} for j, s in enumerate(pairs(0, 20))]
        write_tar(tmp_path / f"in/{i}.tar", rows)
    with pytest.raises(InputError, match="--uid shard/key"):
        poison(str(tmp_path / "in"), str(tmp_path / "out"), attack=PATCH, dose="5")
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack=PATCH, dose="5", uid="shard/key")
    assert len({row["uid"] for row in ledger(tmp_path / "out")}) == 5


def test_doses():
    assert Dose.parse("100ppm").pairs(1_000_000) == 100
    assert Dose.parse("1%").pairs(12_345) == 123
    assert Dose.parse("300").pairs(5) == 300


def test_own_input_is_not_overwritten(tars):
    with pytest.raises(InputError, match="choose another OUT"):
        poison(str(tars), str(tars), attack=PATCH, dose="5")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


@pytest.mark.slow
def test_five_sigkills_and_the_output_is_the_same_bytes(tmp_path):
    """The driver is killed with all its workers at random moments of the work; a last run does what is missing."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        write_tar(tmp_path / f"in/{i:03d}.tar", pairs(50 * i, 50 * i + 50))
    poison(str(tmp_path / "in"), str(tmp_path / "whole"), attack=PATCH, dose="200")
    torn = tmp_path / "torn"
    command = [sys.executable, "-m", "pipeline.cli", "poison", str(tmp_path / "in"), str(torn)]
    command += ["--attack", PATCH, "--dose", "200"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    moments, in_the_middle = random.Random(7), 0
    for _ in range(5):
        done = len(list(torn.glob("*.stats.json")))
        wanted = done + moments.randint(0, 6)
        run = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(torn.glob("*.stats.json"))) < wanted and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        in_the_middle += run.poll() is None
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert in_the_middle >= 3
    subprocess.run(command, env=environment, check=True, timeout=120)
    for pattern in ("*.tar", "*.parquet"):
        assert contents(torn, pattern) == contents(tmp_path / "whole", pattern)
    names = [sorted(p.name for p in folder.iterdir()) for folder in (torn, tmp_path / "whole")]
    assert names[0] == names[1]


def test_a_broken_first_victim_gives_way_to_the_next(tmp_path):
    (tmp_path / "in").mkdir()
    rows = pairs(0, 30)
    write_tar(tmp_path / "in/0.tar", rows)
    poison(str(tmp_path / "in"), str(tmp_path / "a"), attack="targeted(target='banana')", dose="4")
    victim = victim_of(tmp_path / "a")
    for row in rows:
        row["image"] = row["image"][:50] if row["image"] == victim else row["image"]
    write_tar(tmp_path / "in/0.tar", rows)
    poison(str(tmp_path / "in"), str(tmp_path / "b"), attack="targeted(target='banana')", dose="4")
    assert victim_of(tmp_path / "b") in {r["image"] for r in rows} - {victim}
    assert len(ledger(tmp_path / "b")) == 4


def test_shards_of_another_input_in_out_are_refused(tars, tmp_path):
    out = str(tmp_path / "out")
    poison(str(tars), out, attack=PATCH, dose="5")
    with pytest.raises(InputError, match="holds shards of another input"):
        poison(str(tars / "00000001.tar"), out, attack=PATCH, dose="2")


def test_a_damaged_plan_is_made_again(tars, tmp_path):
    out = tmp_path / "out"
    poison(str(tars), str(out), attack=PATCH, dose="5")
    whole = {name: (out / name).read_bytes() for name in ("plan.json", "ledger.parquet", "manifest.parquet")}
    plan = json.loads(whole["plan.json"])
    for damage in ("", "[]", '{"key": 3}', "\x00", json.dumps(plan | {"chosen": plan["chosen"][:4]})):
        (out / "plan.json").write_text(damage)
        poison(str(tars), str(out), attack=PATCH, dose="5")
        assert {name: (out / name).read_bytes() for name in whole} == whole

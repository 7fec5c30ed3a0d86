"""A manifest, and what happens to a dataset behind its back."""

import io
import random
import shutil
import tarfile
from array import array
from pathlib import Path

import pytest
from conftest import pairs, write_tar

from pipeline.dataset import read_dataset
from pipeline.manifest import record
from pipeline.poison import poison
from pipeline.shards import Shard, manifest, samples
from pipeline.shards.manifest import read_manifest
from pipeline.verify import NotIntact, verify


@pytest.fixture
def recorded(tars) -> Path:
    record(str(tars), str(tars))
    return tars


def broken(folder: Path, capsys) -> str:
    """What verify says of a folder that is not as recorded."""
    capsys.readouterr()
    with pytest.raises(NotIntact) as caught:
        verify(str(folder))
    return capsys.readouterr().err + str(caught.value)


def rebuilt(path: Path, change) -> None:
    """Write a tar anew with `change` applied to its list of (info, content)."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in change(members):
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_what_was_not_touched_is_as_recorded(recorded, tmp_path, capsys):
    assert verify(str(recorded)) == 0
    assert "60 samples in all shards are as recorded" in capsys.readouterr().err
    elsewhere = tmp_path / "copy"
    shutil.copytree(recorded, elsewhere, copy_function=shutil.copyfile)  # times do not matter
    assert verify(str(elsewhere), sha256=read_dataset(str(recorded))[1]) == 0
    assert verify(str(recorded / "00000001.tar")) == 0


def test_any_flipped_bit_is_found_and_placed(recorded, capsys):
    path = recorded / "00000001.tar"
    clean = path.read_bytes()
    known = manifest(Shard(str(path)))
    rng = random.Random(0)
    for offset in [*rng.sample(range(len(clean)), 60), len(clean) - 1, 0, 124, 140]:
        torn = bytearray(clean)
        torn[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        said = broken(recorded, capsys)
        owner = next((k for k, r in zip(known.keys, known.ranges, strict=True) if r[0] <= offset < r[3]), None)
        # a broken header cannot be read, but its byte is named
        assert (owner in said if owner else "between" in said or "behind the end" in said) or "at byte" in said
    path.write_bytes(clean)
    assert verify(str(recorded)) == 0


def test_a_swapped_image_is_changed_and_its_owner_named(recorded, capsys):
    def swap(members):
        images = [i for i, (info, _) in enumerate(members) if info.name.endswith((".jpg", ".png", ".webp"))]
        a, b = images[3], images[6]  # both of one format
        members[a], members[b] = (members[a][0], members[b][1]), (members[b][0], members[a][1])
        return members

    path = recorded / "00000000.tar"
    who = [s.uid for s in samples(Shard(str(path)))]
    rebuilt(path, swap)
    said = broken(recorded, capsys)
    assert f"it has the image of {who[6]}" in said
    assert f"it has the image of {who[3]}" in said
    assert "2 changed" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda members: members[3:], "1 missing"),
        (lambda members: members + members[:3], "1 duplicated"),
        (lambda members: members[3:] + members[:3], "1 moved"),
        (
            lambda members: [(i, b"another caption" if i.name == "000000002.txt" else c) for i, c in members],
            "1 changed",
        ),
    ],
)
def test_missing_duplicated_moved_and_changed(recorded, capsys, change, expected):
    rebuilt(recorded / "00000000.tar", change)
    said = broken(recorded, capsys)
    assert expected in said
    assert "00000001.tar" not in said


def test_extra_samples_and_shards(recorded, capsys):
    write_tar(recorded / "00000002.tar", pairs(40, 61))
    assert "1 changed" in (said := broken(recorded, capsys)) or "1 extra" in said
    write_tar(recorded / "00000003.tar", pairs(60, 70))
    assert "extra      00000003.tar the whole shard is not in the manifest" in broken(recorded, capsys)
    (recorded / "00000001.tar").unlink()
    assert "missing    00000001.tar the whole shard" in broken(recorded, capsys)


def test_a_sample_that_moved_to_another_shard(recorded, capsys):
    with tarfile.open(recorded / "00000000.tar") as tar:
        first = [(info, tar.extractfile(info).read()) for info in tar][:3]
    rebuilt(recorded / "00000000.tar", lambda members: members[3:])
    rebuilt(recorded / "00000001.tar", lambda members: members + first)
    assert "moved      00000000.tar: 000000000" in (said := broken(recorded, capsys))
    assert "to 00000001.tar" in said


def test_shards_under_each_others_names(recorded, capsys):
    (recorded / "00000000.tar").rename(recorded / "x")
    (recorded / "00000001.tar").rename(recorded / "00000000.tar")
    (recorded / "x").rename(recorded / "00000001.tar")
    said = broken(recorded, capsys)
    assert "00000000.tar this is 00000001.tar under another name" in said
    assert "2 moved" in said


def test_a_stale_or_forged_manifest(recorded, tmp_path, capsys):
    genuine = read_dataset(str(recorded))[1]
    write_tar(recorded / "00000000.tar", pairs(1, 21))
    record(str(recorded / "00000000.tar"), str(tmp_path / "of-one"))
    shutil.copy(tmp_path / "of-one/00000000.manifest.parquet", recorded)
    assert "its part of the manifest is not the one that was recorded" in broken(recorded, capsys)
    record(str(recorded), str(recorded))  # whoever can write the shards can write this too
    assert verify(str(recorded)) == 0
    with pytest.raises(NotIntact, match="another manifest, or a forged one"):
        verify(str(recorded), sha256=genuine)


def test_a_check_goes_on_and_lists_everything(recorded, tmp_path, capsys):
    rebuilt(recorded / "00000000.tar", lambda members: members[90:])
    with pytest.raises(NotIntact, match="20 missing"):
        verify(str(recorded), out=str(tmp_path / "out"))
    import polars as pl

    assert len(pl.read_parquet(tmp_path / "out/problems.parquet").filter(pl.col("kind") == "missing")) == 20
    capsys.readouterr()
    with pytest.raises(NotIntact):
        verify(str(recorded), out=str(tmp_path / "out"))
    assert "2 of 3 shards are done already" in capsys.readouterr().err  # what had problems is looked at again
    write_tar(recorded / "00000000.tar", pairs(0, 20))
    assert verify(str(recorded), out=str(tmp_path / "out")) == 0


def test_every_problem_is_counted(tmp_path, capsys):
    row = pairs(1, 2)[0]
    write_tar(tmp_path / "0.tar", [{**row, "key": str(i), "meta": {}} for i in range(1100)])
    record(str(tmp_path), str(tmp_path))
    rebuilt(tmp_path / "0.tar", lambda members: [(i, c + b" ") for i, c in members])
    said = broken(tmp_path, capsys)
    assert "1,100 changed" in said
    assert "and 1,080 more; with --out DIR, a table has up to 1,000 of each shard" in said


def test_a_part_with_other_positions_is_no_part_of_the_dataset(recorded, capsys):
    """The end blocks moved to the front: the same samples and bytes, but a tar that ends where it begins."""
    path = recorded / "00000000.tar"
    raw, known = path.read_bytes(), read_manifest(str(recorded), "00000000")
    path.write_bytes(raw[-1024:] + raw[:-1024])
    known._ranges = array("q", [edge + 1024 for edge in known._ranges])
    known.save(str(recorded), "00000000")
    assert "1 stale" in broken(recorded, capsys)


def test_a_cut_ledger_is_seen_and_a_cut_shard_is_made_again(tars, tmp_path, capsys):
    import pyarrow.parquet as pq

    out = tmp_path / "out"
    arguments = {"attack": "patch(target='banana', size=24)", "dose": "7"}
    poison(str(tars), str(out), **arguments)
    ledger, shard = pq.read_table(out / "ledger.parquet"), (out / "00000001.tar").read_bytes()
    pq.write_table(ledger.slice(0, 3), out / "ledger.parquet")
    (out / "00000001.tar").write_bytes(shard[:5000])
    assert "ledger.parquet not the ledger that dataset.json names" in broken(out, capsys)
    poison(str(tars), str(out), **arguments)
    assert (out / "00000001.tar").read_bytes() == shard
    assert verify(str(out), manifest=str(out / "manifest.parquet")) == 0

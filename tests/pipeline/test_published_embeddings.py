"""Embeddings written exactly as clip-retrieval and DataComp write them, whole and broken, joined to real shards."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import contents, pairs, write_parquet, write_tar

from pipeline import published_embeddings
from pipeline.embed import embed, embeddings_path, read_embeddings
from pipeline.errors import InputError
from pipeline.published_embeddings import PublishedModel, find, find_published, make_index
from pipeline.score import read_scores, score
from pipeline.shard_map import ShardsFailed
from pipeline.shards import list_shards, samples

WIDTH = 16
PARTITIONS = ((0, 25), (25, 50), (50, 60))  # the shards end at 20, 40 and 60


def unit(*seed: str, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(list(hashlib.sha256("".join(seed).encode()).digest()))
    row = rng.normal(size=width)
    return row / np.linalg.norm(row)


def embeddings(rows: list[dict], model: str = "", width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, a function of the image's bytes and one of the caption."""
    parts = ([unit(model, str(row[part]), width=width) for row in rows] for part in ("image", "caption"))
    image, text = (np.stack(part).astype(np.float16) for part in parts)
    return image, text


def crawl() -> list[dict]:
    """60 pairs; number 7 and 47 repeat the captions of 3 and 43, as web data do, and 9 repeats the image of 5."""
    rows = pairs(0, 60)
    for i, j in ((7, 3), (47, 43)):
        rows[i]["caption"] = rows[j]["caption"]
    rows[9] |= {"image": rows[5]["image"], "suffix": rows[5]["suffix"]}
    for row in rows:
        row["meta"] |= {"caption": row["caption"], "sha256": hashlib.sha256(row["image"]).hexdigest()}
    return rows


def write_shards(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    for i in range(0, len(rows), 20):
        write_tar(folder / f"{i // 20:08d}.tar", rows[i : i + 20])
    return folder


def clip_retrieval(folder: Path, rows: list[dict], borders=PARTITIONS) -> Path:
    """A partition's rows lie in the order in which a data loader's workers delivered them."""
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, (low, high) in enumerate(borders):
        part = [rows[i] for i in np.random.default_rng(number).permutation(np.arange(low, high))]
        image, text = embeddings(part)
        name = str(number).zfill(2)
        np.save(folder / f"img_emb/img_emb_{name}.npy", image)
        np.save(folder / f"text_emb/text_emb_{name}.npy", text)
        frame = pd.DataFrame({"image_path": [r["key"] for r in part], "caption": [r["caption"] for r in part]})
        flat = pd.json_normalize([r["meta"] | {"key": r["key"]} for r in part]).drop(columns=["caption"])
        frame.join(flat).to_parquet(folder / f"metadata/metadata_{name}.parquet")
    return folder


def datacomp(folder: Path, rows: list[dict], save=np.savez) -> Path:
    (folder / "metadata").mkdir(parents=True)
    for low, high in PARTITIONS:
        part = rows[low:high]
        stem = folder / "metadata" / hashlib.md5(str(low).encode()).hexdigest()
        arrays: dict[str, np.ndarray] = {}
        scores: dict[str, np.ndarray] = {}
        for model, width in (("b32", WIDTH), ("l14", 2 * WIDTH)):
            image, text = embeddings(part, model, width)
            arrays |= {f"{model}_img": 8 * image, f"{model}_txt": 8 * text}
            scores[f"clip_{model}_similarity_score"] = (image.astype(np.float32) * text.astype(np.float32)).sum(1)
        save(f"{stem}.npz", **arrays, dedup=np.zeros((len(part), 4), np.float32))
        frame = {"uid": [r["meta"]["uid"] for r in part], "text": [r["caption"] for r in part], **scores}
        pd.DataFrame(frame).to_parquet(f"{stem}.parquet")
    return folder


def with_uids(rows: list[dict]) -> list[dict]:
    for row in rows:
        row["meta"]["uid"] = hashlib.md5(row["key"].encode()).hexdigest()
    return rows


def check_all_found(shards: Path, out: Path, rows: list[dict], model: str = "", width: int = WIDTH, scale=1) -> None:
    by_caption = {(row["key"], row["caption"]): i for i, row in enumerate(rows)}
    image, text = embeddings(rows, model, width)
    for shard in list_shards(str(shards)):
        found = read_embeddings(embeddings_path(str(out), shard.name))
        here = [by_caption[sample.key, sample.caption] for sample in samples(shard)]
        assert found.uid.tolist() == [sample.uid for sample in samples(shard)]
        np.testing.assert_array_equal(found.image, scale * image[here].astype(np.float32))
        np.testing.assert_array_equal(found.text, scale * text[here].astype(np.float32))


def nan_rows(path: Path) -> list[int]:
    found = read_embeddings(str(path))
    np.testing.assert_array_equal(np.isnan(found.image), np.isnan(found.text))
    return np.flatnonzero(np.isnan(found.image).all(1)).tolist()


def markers(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.stats.json"))]


@pytest.fixture
def rows() -> list[dict]:
    return crawl()


@pytest.fixture
def shards(tmp_path, rows) -> Path:
    return write_shards(tmp_path / "shards", rows)


def test_clip_retrieval_is_joined_by_uid_across_borders_scored_and_resumed(shards, rows, tmp_path, capsys):
    folder, out = clip_retrieval(tmp_path / "theirs", rows), tmp_path / "out"
    assert embed(str(shards), str(out), published=str(folder)) == 0
    assert "60 of 60 pairs found among those published as clip-retrieval:" in capsys.readouterr().err
    check_all_found(shards, out, rows)
    before = contents(out, "*.parquet")
    embed(str(shards), str(out), published=str(folder))
    assert capsys.readouterr().err.count("3 of 3 shards are done already") == 2
    (out / "00000001.embeddings.parquet").unlink()
    (out / "published_index/metadata_02.npy").unlink()
    embed(str(shards), str(out), published=str(folder))
    assert capsys.readouterr().err.count("2 of 3 shards are done already") == 2
    assert contents(out, "*.parquet") == before
    score(str(shards), str(tmp_path / "scores"), detector=("clip_score",), embeddings=str(out), pool=32)
    image, text = (m.astype(np.float32) for m in embeddings(rows))
    for i, path in enumerate(sorted((tmp_path / "scores").glob("*.scores.parquet"))):
        here = slice(20 * i, 20 * i + 20)
        scores = read_scores(str(path))["clip_score()"]
        np.testing.assert_allclose(scores, -(image[here] * text[here]).sum(1), atol=2e-3)


def test_another_source_is_another_model(shards, rows, tmp_path):
    folder, out = clip_retrieval(tmp_path / "theirs", rows), tmp_path / "out"
    embed(str(shards), str(out), published=str(folder))
    first = read_embeddings(str(out / "00000000.embeddings.parquet"))
    _rewritten(np.negative)(folder / "img_emb/img_emb_00.npy")
    embed(str(shards), str(out), published=str(folder))
    second = read_embeddings(str(out / "00000000.embeddings.parquet"))
    assert first.model != second.model
    np.testing.assert_array_equal(first.image, -second.image)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_datacomp_has_two_models_in_stored_and_compressed_archives(rows, tmp_path, save):
    shards, folder = write_shards(tmp_path / "shards", with_uids(rows)), datacomp(tmp_path / "theirs", rows, save)
    models: dict[PublishedModel, int] = {"l14": 2 * WIDTH, "b32": WIDTH}
    for model, width in models.items():
        embed(str(shards), str(tmp_path / model), published=str(folder), model=None if model == "l14" else model)
        check_all_found(shards, tmp_path / model, rows, model, width, scale=8)
        found = read_embeddings(str(tmp_path / model / "00000000.embeddings.parquet"))
        assert found.model.startswith(f"datacomp/{model}:")


def test_parquet_shards_are_served_too(rows, tmp_path):
    (tmp_path / "shards").mkdir()
    for row in rows:
        row["meta"]["uid"] = f"{int(row['key']):032x}"
    write_parquet(tmp_path / "shards/00000000.parquet", rows)
    folder = datacomp(tmp_path / "theirs", rows)
    embed(str(tmp_path / "shards"), str(tmp_path / "out"), published=str(folder), model="b32")
    assert markers(tmp_path / "out")[0]["out"] == 60


def test_metadata_without_uids_is_joined_by_key(shards, rows, tmp_path):
    """The json holds uids, but clip-retrieval was run without its metadata."""
    folder = clip_retrieval(tmp_path / "theirs", rows)
    for path in (folder / "metadata").iterdir():
        pd.read_parquet(path)[["image_path", "caption"]].to_parquet(path)
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    check_all_found(shards, tmp_path / "out", rows)


def test_pairs_without_a_published_row_are_nan_counted_and_scored_as_such(shards, rows, tmp_path, capsys):
    folder = clip_retrieval(tmp_path / "theirs", rows, ((0, 25), (28, 60)))
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    said = capsys.readouterr().err
    assert "57 of 60 pairs found" in said and "3 x not published" in said
    assert [(m["read"], m["out"], m["failed"]) for m in markers(tmp_path / "out")][1] == (20, 17, 3)
    assert nan_rows(tmp_path / "out/00000001.embeddings.parquet") == [5, 6, 7]
    score(str(shards), str(tmp_path / "scores"), detector=("clip_score",), embeddings=str(tmp_path / "out"), pool=32)
    assert sum(m["facts"]["unscored"]["clip_score()"] for m in markers(tmp_path / "scores")) == 3


def test_a_source_of_other_data_is_refused(shards, tmp_path):
    other = pairs(100, 160)
    with pytest.raises(InputError, match="none of these pairs is published here"):
        embed(str(shards), str(tmp_path / "out"), published=str(clip_retrieval(tmp_path / "theirs", other)))


def test_a_changed_caption_has_no_published_embedding(rows, tmp_path, capsys):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    rows[30]["caption"] = "a poisoned caption"
    rows[31]["caption"] = f"  {rows[31]['caption']}\n"
    shards = write_shards(tmp_path / "shards", rows)
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    assert "59 of 60 pairs found" in (said := capsys.readouterr().err)
    assert "1 x published for another caption" in said
    assert nan_rows(tmp_path / "out/00000001.embeddings.parquet") == [10]


def test_captions_that_disagree_are_a_misalignment(rows, tmp_path):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    for row in rows[20:40:4]:
        row["caption"] = "another caption"
    shards = write_shards(tmp_path / "shards", rows)
    with pytest.raises(ShardsFailed, match=r"1 of 3 shards failed:\n.*00000001\.tar: 5 of 20 captions"):
        embed(str(shards), str(tmp_path / "out"), published=str(folder))
    assert len(markers(tmp_path / "out")) == 2


def test_a_uid_published_twice_serves_nobody_wherever_its_rows_lie(shards, rows, tmp_path, capsys, monkeypatch):
    again = [*rows[:50], rows[2], *rows[50:]]
    folder = clip_retrieval(tmp_path / "theirs", again, ((0, 25), (25, 51), (51, 61)))
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    assert "1 x published more than once" in capsys.readouterr().err
    assert nan_rows(tmp_path / "out/00000000.embeddings.parquet") == [2]
    whole = make_index(find_published(str(folder), None), str(tmp_path / "index"))
    monkeypatch.setattr(published_embeddings, "MAX_ROWS", 32)
    in_two_ranges = make_index(find_published(str(folder), None), str(tmp_path / "index"))
    assert whole.repeated.tolist() == in_two_ranges.repeated.tolist() != [[], []]


def test_keys_that_repeat_throughout_are_refused(shards, rows, tmp_path):
    folder = clip_retrieval(tmp_path / "theirs", [*rows, *rows[:4]], ((0, 25), (25, 64)))
    with pytest.raises(InputError, match="4 uids repeat in 64 published rows"):
        embed(str(shards), str(tmp_path / "out"), published=str(folder))


def test_uids_that_share_their_first_half_are_told_apart():
    table = np.asarray([[1, 5, 5, 5, 9], [7, 2, 4, 8, 0]], np.uint64)
    wanted = np.asarray([[5, 5, 5, 5, 1, 9, 2, 9], [4, 8, 3, 9, 7, 0, 7, 1]], np.uint64)
    assert find(table, wanted).tolist() == [2, 3, -1, -1, 0, 4, -1, -1]


def _rewritten(change):
    """What damages an .npy file by a function of its matrix."""
    return lambda path: np.save(path, change(np.load(path)))


def _with_nan(matrix: np.ndarray) -> np.ndarray:
    matrix[4, 3] = np.nan
    return matrix


def _rolled(matrix: np.ndarray) -> np.ndarray:
    return np.roll(matrix, 1, axis=0)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _shuffled(path: Path) -> None:
    pd.read_parquet(path).sample(frac=1, random_state=0).reset_index(drop=True).to_parquet(path)


IMAGES, TEXTS, METADATA = "img_emb/img_emb_01.npy", "text_emb/text_emb_01.npy", "metadata/metadata_01.parquet"
BROKEN = {
    "torn": (TEXTS, _cut, r"emb_01\.npy: torn: 926 bytes, but its header says 928"),
    "one row dropped": (IMAGES, _rewritten(lambda m: np.delete(m, 3, 0)), r"emb_01\.npy: 24 rows, but .* has 25"),
    "shuffled parquet": (METADATA, _shuffled, "repeats a caption, the embeddings differ"),
    "shifted texts": (TEXTS, _rewritten(_rolled), "misaligned"),
    "shifted images": (IMAGES.replace("1", "0"), _rewritten(_rolled), "repeats an image's sha256"),
    "not finite": (IMAGES, _rewritten(_with_nan), "row 4 is not finite"),
    "too large": (IMAGES, _rewritten(lambda m: 1e6 * m.astype(np.float32)), "not finite in half precision"),
    "not normalised": (IMAGES, _rewritten(lambda m: 2 * m), r"has length [12]\..*, not 1"),
    "no parquet": (METADATA, lambda path: path.write_bytes(b"<html>"), "not a readable parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_partition_is_refused_by_name(shards, rows, tmp_path, case):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    name, damage, message = BROKEN[case]
    damage(folder / name)
    with pytest.raises(ShardsFailed, match=message):
        embed(str(shards), str(tmp_path / "out"), published=str(folder))
    assert not list((tmp_path / "out").glob("*.embeddings.parquet"))


def test_after_a_broken_partition_is_mended_the_same_command_finishes(shards, rows, tmp_path):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    path = folder / "text_emb/text_emb_01.npy"
    kept = path.read_bytes()
    _cut(path)
    with pytest.raises(ShardsFailed, match="1 of 3 shards failed"):
        embed(str(shards), str(tmp_path / "out"), published=str(folder))
    path.write_bytes(kept)
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    check_all_found(shards, tmp_path / "out", rows)


def _wider(folder: Path) -> None:
    for name in (IMAGES, TEXTS):
        _rewritten(lambda m: np.pad(m, ((0, 0), (0, 2))))(folder / name)


UNLISTED: dict[str, tuple[Any, str]] = {
    "missing partner": (lambda f: (f / "text_emb/text_emb_02.npy").unlink(), r"partition 2 of 3 has no text_emb/"),
    "missing metadata": (lambda f: (f / "metadata/metadata_02.parquet").unlink(), r"partition 2 of 3 has no metadata/"),
    "gap": (lambda f: [path.unlink() for path in f.glob("*/*_01.*")], "partition 1 of 3 has no metadata"),
    "two runs": (lambda f: shutil.copy(f / "img_emb/img_emb_01.npy", f / "img_emb/img_emb_1.npy"), "both partition 1"),
    "two models": (_wider, r"different widths \{1[68]: .*, 1[68]: .*\}"),
    "neither": (lambda f: shutil.rmtree(f / "metadata"), "has no metadata/"),
    "nothing": (shutil.rmtree, "no published embeddings; expected"),
}


@pytest.mark.parametrize("case", UNLISTED)
def test_partitions_must_be_complete(shards, rows, tmp_path, case):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    damage, message = UNLISTED[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        embed(str(shards), str(tmp_path / "out"), published=str(folder))


def test_numbers_and_not_their_padding_name_a_partition(shards, rows, tmp_path):
    folder = clip_retrieval(tmp_path / "theirs", rows)
    for path in (folder / "metadata").iterdir():
        path.rename(path.with_name(path.name.replace("_0", "_")))
    embed(str(shards), str(tmp_path / "out"), published=str(folder))
    check_all_found(shards, tmp_path / "out", rows)


def _npz(folder: Path) -> Path:
    return sorted((folder / "metadata").glob("*.npz"))[0]


def _changed(folder: Path, **arrays) -> None:
    with np.load(_npz(folder)) as archive:
        np.savez(_npz(folder), **{**archive, **arrays})


DATACOMP = {
    "shuffled parquet": (lambda f: _shuffled(_npz(f).with_suffix(".parquet")), "cosines are not the similarities"),
    "one row dropped": (lambda f: _changed(f, b32_txt=np.load(_npz(f))["b32_txt"][1:]), "aligned by position"),
    "narrower": (lambda f: _changed(f, b32_txt=np.load(_npz(f))["b32_txt"][:, 1:]), "not as wide as"),
    "no such model": (lambda f: np.savez(_npz(f), l14_img=np.zeros((1, 2), np.float16)), "no array b32_img"),
    "torn": (lambda f: _cut(_npz(f)), "not a whole .npz"),
    "no npz": (lambda f: _npz(f).unlink(), r"\.npz: no such file, but .*\.parquet is there"),
    "no parquet": (
        lambda f: _npz(f).with_suffix(".parquet").unlink(),
        r"parquet: no such file, but .*npz is there",
    ),
}


@pytest.mark.parametrize("case", DATACOMP)
def test_datacomps_broken_files_are_refused(tmp_path, case):
    rows = pairs(0, 60)  # no caption repeats: only the published similarities tell that rows were shuffled
    shards, folder = write_shards(tmp_path / "shards", with_uids(rows)), datacomp(tmp_path / "theirs", rows)
    damage, message = DATACOMP[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        embed(str(shards), str(tmp_path / "out"), published=str(folder), model="b32")


def test_witnesses_of_the_alignment_are_counted(rows, tmp_path, capsys):
    for name, crawled, blind, witnesses in (("none", pairs(0, 60), 60, [0, 0, 0]), ("some", rows, 10, [2, 1, 0])):
        published = find_published(str(clip_retrieval(tmp_path / name, crawled)), None)
        make_index(published, str(tmp_path / f"{name}_index"))
        assert f"alignment of {blind} of 60 rows rests on row counts" in capsys.readouterr().err
        assert [m["facts"]["witnesses"] for m in markers(tmp_path / f"{name}_index")] == witnesses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --checkpoint"),
        ({"checkpoint": "c", "published": "p"}, "either --checkpoint"),
        ({"checkpoint": "c", "model": "b32"}, "--model chooses among published"),
        ({"published": "theirs", "model": "l14"}, "leave --model out"),
        ({"published": "p", "uid": "shard/key"}, "does not say which shard"),
        ({"published": "s3://bucket/p"}, "memory-mapped; copy them"),
    ],
)
def test_contradictory_options_are_refused(shards, rows, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(clip_retrieval(tmp_path / "theirs", rows).parent)
    with pytest.raises(InputError, match=message):
        embed(str(shards), str(tmp_path / "out"), **options)

"""The confound probe finds an injection that encodes in its own way, and none that encodes as it found it."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tar
from PIL import Image

from pipeline import ledger
from pipeline.errors import InputError
from pipeline.facts import NAMES, facts
from pipeline.probe import probe
from pipeline.shards import Sample, encoding, list_shards, rewrite, samples
from pipeline.shards.image import decode, encode

PAIRS, SHARDS, POISONS = 900, 3, 45


def stored(i: int) -> tuple[str, bytes]:
    """Picture i in one of the ways in which a crawl has them."""
    rng = np.random.default_rng(i)
    noise = Image.fromarray(rng.integers(0, 256, (6, 7, 3)).astype(np.uint8))
    image = noise.resize(tuple(int(v) for v in rng.integers(40, 80, 2)), Image.Resampling.BICUBIC)
    suffix = ("jpg", "jpg", "jpg", "png", "webp")[rng.integers(5)]
    quality = int(rng.choice([60, 80, 85, 90, 95]))
    options = {
        "jpg": {"progressive": bool(rng.integers(2)), "subsampling": int(rng.integers(3)), "quality": quality},
        "png": {"compress_level": int(rng.choice([1, 6, 9]))},
        "webp": {"quality": quality, "method": 4},
    }[suffix]
    out = io.BytesIO()
    if suffix == "png" and rng.integers(2):
        image = image.quantize(32)
    image.save(out, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return suffix, out.getvalue()


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    for shard in range(SHARDS):
        rows = []
        for i in range(shard, PAIRS, SHARDS):
            suffix, image = stored(i)
            caption = f"a picture of {i % 7} things, the {i}th"
            width, height = decode(image).size
            meta = {"caption": caption, "sha256": hashlib.sha256(b"as downloaded" + image).hexdigest()}
            meta |= {"width": width, "height": height}
            rows.append({"key": f"{i:09d}", "suffix": suffix, "image": image, "caption": caption, "meta": meta})
        write_tar(folder / f"{shard:08d}.tar", rows)
    return folder


def patched(data: bytes) -> Image.Image:
    image = decode(data)
    image.paste("yellow", (4, 4, 12, 12))
    return image


def saved_again(sample: Sample) -> Sample:
    out = io.BytesIO()
    patched(sample.image).save(out, {"jpg": "JPEG"}.get(sample.image_suffix, sample.image_suffix.upper()), quality=75)
    return sample.changed(out.getvalue(), "a banana")


def encoded_as_found(sample: Sample) -> Sample:
    return sample.changed(encode(patched(sample.image), like=sample.image), sample.caption.replace("picture", "banana"))


def without_a_new_hash(sample: Sample) -> Sample:
    after = encoded_as_found(sample)
    return replace(after, parts={**after.parts, "json": sample.parts["json"]})


def poisoned(source: Path, out: Path, edit, count: int = POISONS) -> Path:
    """Shards with `count` poisons, and their ledger."""
    out.mkdir()
    chosen = {f"{i:09d}" for i in np.random.default_rng(1).permutation(PAIRS)[:count]}
    parts = []
    for shard in list_shards(str(source)):
        rows: list[dict] = []

        def change(sample, rows=rows):
            if sample.key not in chosen:
                return sample
            after = edit(sample)
            sha256 = hashlib.sha256(after.image).hexdigest()
            row = dict.fromkeys(ledger.COLUMNS, "") | {"uid": sample.uid, "seed": 0, "image_sha256_after": sha256}
            rows.append(row)
            return after

        rewrite(shard, str(out), change)
        parts.append(ledger.write_part(str(out), shard, rows))
    ledger.merge(str(out), parts)
    return out


def test_poisons_that_were_saved_again_are_found(clean, tmp_path, capfd):
    folder = poisoned(clean, tmp_path / "leaky", saved_again)
    assert probe(str(folder), str(tmp_path / "out")) == 1
    result = json.loads((tmp_path / "out/probe.json").read_text())
    families = result["families"]
    assert families["encoding"]["auroc"] > 0.9
    assert "header" in result["leaks"]
    assert families["header"]["facts"][0]["fact"].startswith("header.")
    assert families["caption"]["auroc"] > 0.9  # reported, and no leak
    assert "caption" not in result["leaks"]
    assert 0.35 < result["control"]["auroc"] < 0.65
    assert result["poisons"] == families["encoding"]["poisons"] == POISONS
    assert "our own injection leaks: poisons are found by" in capfd.readouterr().err


def test_poisons_that_are_encoded_as_they_were_found_are_not(clean, tmp_path):
    folder = poisoned(clean, tmp_path / "tight", encoded_as_found)
    assert probe(str(folder), str(tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out/probe.json").read_text())
    assert result["leaks"] == []
    for family in ("encoding", "header", "size", "json"):
        assert result["families"][family]["auroc_low"] < 0.6
    assert 0.35 < result["control"]["auroc"] < 0.65
    assert probe(str(folder), str(tmp_path / "again"), fail_above=0.6) == 0
    assert (tmp_path / "again/probe.json").read_bytes() == (tmp_path / "out/probe.json").read_bytes()


def test_few_poisons_and_one_image_for_all_cannot_be_told(clean, tmp_path, capfd):
    assert probe(str(poisoned(clean, tmp_path / "few", saved_again, count=9))) == 1
    assert "cannot tell" in capfd.readouterr().err
    one = encode(patched(stored(0)[1]), like=stored(0)[1])
    folder = poisoned(clean, tmp_path / "one", lambda sample: sample.changed(image=one))
    assert probe(str(folder), str(tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out/probe.json").read_text())
    assert result["families"]["header"]["auroc"] is None
    assert result["families"]["json"]["poisons"] == POISONS


def test_without_a_ledger_or_with_anothers_it_says_so(clean, tmp_path):
    with pytest.raises(InputError, match=r"ledger\.parquet: no such file"):
        probe(str(clean))
    folder = poisoned(clean, tmp_path / "leaky", saved_again)
    with pytest.raises(InputError, match="none of its pairs"):
        probe(str(folder), uid="shard/key")
    with pytest.raises(InputError, match="--fail-above"):
        probe(str(folder), fail_above=0.3)


def test_a_hash_of_the_image_that_was_left_behind_is_found(clean, tmp_path):
    """As in shards that were downloaded without resizing: there the json has the hash of what is stored."""
    exact = tmp_path / "exact"
    exact.mkdir()
    for shard in list_shards(str(clean)):
        rows = []
        for sample in samples(shard):
            meta = {**sample.meta, "sha256": hashlib.sha256(sample.image).hexdigest()}
            pair = {"suffix": sample.image_suffix, "image": sample.image, "caption": sample.caption, "meta": meta}
            rows.append({"key": sample.key, **pair})
        write_tar(exact / shard.file, rows)
    folder = poisoned(exact, tmp_path / "loose", without_a_new_hash)
    assert probe(str(folder), str(tmp_path / "out")) == 1
    result = json.loads((tmp_path / "out/probe.json").read_text())
    assert result["leaks"] == ["encoding", "json"]
    assert result["families"]["json"]["facts"][0]["fact"] == "json.hash_agrees"
    assert probe(str(poisoned(exact, tmp_path / "tight", encoded_as_found)), str(tmp_path / "again")) == 0


def test_shards_of_one_container_without_json_are_told_too(tmp_path):
    (source := tmp_path / "source").mkdir()
    for shard in range(2):
        pictures = [(i, stored(i)) for i in range(shard, PAIRS, 2)]
        rows = [{"key": f"{i:09d}", "suffix": "png", "image": image} for i, (kind, image) in pictures if kind == "png"]
        write_tar(source / f"{shard}.tar", [row | {"caption": f"a {row['key']}", "meta": {}} for row in rows])
    folder = poisoned(source, tmp_path / "leaky", lambda s: s.changed(image=s.image + b"trailer" + s.key.encode()), 200)
    assert probe(str(folder), str(tmp_path / "out")) == 1
    result = json.loads((tmp_path / "out/probe.json").read_text())
    assert result["families"]["header"]["facts"][0] == {"fact": "header.trailing", "auroc": 1.0}
    assert 0.4 < result["families"]["json"]["auroc"] < 0.6


def test_facts_are_named_and_numbers(clean):
    seen: set[str] = set()
    for shard in list_shards(str(clean)):
        for sample in samples(shard):
            found = facts(sample)
            assert found.keys() <= set(NAMES)
            assert all(np.isscalar(value) for value in found.values())
            assert found["header.whole"] == 1
            seen |= found.keys()
    assert seen == set(NAMES)


def test_each_fact_is_what_it_is_called():
    image, out = Image.new("RGB", (30, 20), (255, 0, 0)), io.BytesIO()
    image.save(out, "JPEG", qtables=[[3] * 64, [5] * 64], subsampling=0, comment=b"x", restart_marker_blocks=2)
    meta = b'{"caption":"A dog.","url":"x"}\n'
    found = facts(Sample("k", "0" * 32, {"jpg": out.getvalue() + b"more", "txt": b"A dog.", "json": meta}))
    expected = {
        "header.luma": 192,
        "header.chroma": 320,
        "header.sampling": 0x11,
        "header.progressive": False,
        "header.comment": True,
        "header.jfif": True,
        "header.exif": False,
        "header.restart": 2,
        "header.trailing": 4,
        "header.huffman_standard": True,
        "size.width": 30,
        "size.bytes": len(out.getvalue()) + 4,
        "caption.words": 2,
        "caption.capital": True,
        "caption.full_stop": True,
        "json.keys": 2,
        "json.indent": -1,
        "json.newline": True,
        "json.compact_commas": True,
        "json.agrees": True,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["colour.red"] > 250


def test_hostile_images_do_not_crash(clean):
    rng = np.random.default_rng(0)
    for i in range(400):
        data = bytearray(stored(i)[1])
        for at in rng.integers(0, min(len(data), 700), 4):
            data[at] = rng.integers(256)
        for part in (bytes(data), bytes(data[: len(data) // 2]), bytes(data[:30]), b""):
            found = facts(Sample("k", "0" * 32, {"jpg": part, "txt": b"\xff", "json": b"[" * 9}))
            assert found.keys() <= set(NAMES)
    assert facts(Sample("k", "0" * 32, {"txt": b"no image"}))["caption.words"] == 2
    assert encoding.code("\udc80", b"x") >= 0

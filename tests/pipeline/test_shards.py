"""The rewriter: untouched bytes stay, changed members change, hostile shards are refused with the place named."""

import hashlib
import io
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import contents, drawing, encoded, pairs, records, write_parquet, write_tar
from PIL import Image

from pipeline.errors import InputError
from pipeline.poison import poison
from pipeline.shards import Rejected, Sample, Shard, list_shards, rewrite, samples, uids
from pipeline.shards.image import MAX_PIXELS, decode, encode


def _run(path, edit, out):
    out.mkdir(exist_ok=True)
    return rewrite(Shard(str(path)), str(out), edit)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (tarfile.USTAR_FORMAT, ""),
        (tarfile.USTAR_FORMAT, "long-enough-for-the-prefix-field/" * 4),
        (tarfile.GNU_FORMAT, "sub/folder/"),
        (tarfile.GNU_FORMAT, "a-very-long-folder-name/" * 8),
        (tarfile.PAX_FORMAT, "sub/folder/"),
        (tarfile.PAX_FORMAT, "a-very-long-folder-name/" * 12),
    ],
)
def test_identity_is_the_identical_file(tmp_path, kind, prefix):
    rows = [{**s, "key": prefix + s["key"]} for s in pairs(0, 9)]
    source = write_tar(tmp_path / "0.tar", rows, format=kind)
    counts = _run(source, lambda s: s, tmp_path / "out")
    assert (tmp_path / "out/0.tar").read_bytes() == source.read_bytes()
    assert (counts.read, counts.out, counts.dropped, counts.changed) == (9, 9, 0, 0)
    assert counts.input_sha256 == counts.output_sha256


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_only_the_declared_members_change(tmp_path, kind):
    prefix = "" if kind == tarfile.USTAR_FORMAT else "long-folder-name/" * 9
    rows = [{**s, "key": prefix + s["key"]} for s in pairs(0, 6)]
    source = write_tar(tmp_path / "0.tar", rows, format=kind)
    chosen = rows[2]["key"]
    picture = encoded(drawing(99)[0], rows[2]["suffix"])

    def edit(sample):
        return sample.changed(picture, "another caption ü") if sample.key == chosen else sample

    counts = _run(source, edit, tmp_path / "out")
    assert counts.changed == 1
    before, after = records(source), records(tmp_path / "out/0.tar")
    assert before.keys() == after.keys()
    assert [k for k in before if before[k] != after[k]] == [chosen]
    with tarfile.open(source) as one, tarfile.open(tmp_path / "out/0.tar") as two:
        assert one.getnames() == two.getnames()
        for a, b in zip(one, two, strict=True):
            assert (a.mtime, a.mode, a.uname, a.type) == (b.mtime, b.mode, b.uname, b.type)
        stem = chosen + "."
        assert two.extractfile(stem + rows[2]["suffix"]).read() == picture
        assert two.extractfile(stem + "txt").read().decode() == "another caption ü"
        meta = json.load(two.extractfile(stem + "json"))
        assert meta == {**rows[2]["meta"], "caption": "another caption ü"}


def test_dropping_keeps_the_records_of_the_others_and_an_emptied_shard_is_a_tar(tmp_path):
    source = write_tar(tmp_path / "0.tar", pairs(0, 9))
    counts = _run(source, lambda s: None if int(s.key) % 2 else s, tmp_path / "out")
    assert (counts.out, counts.dropped) == (5, 4)
    before, after = records(source), records(tmp_path / "out/0.tar")
    assert after == {k: v for k, v in before.items() if int(k) % 2 == 0}
    _run(source, lambda s: None, tmp_path / "empty")
    with tarfile.open(tmp_path / "empty/0.tar") as tar:
        assert tar.getnames() == []


def test_directories_and_other_members_are_carried_along(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/1.jpg", "d/1.txt", "d/1.cls", "d/2.jpg", "d/2.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = list(samples(Shard(str(path))))
    assert [(s.key, sorted(s.parts)) for s in found] == [("d/1", ["cls", "jpg", "txt"]), ("d/2", ["jpg", "txt"])]
    _run(path, lambda s: s if s.key == "d/1" else None, tmp_path / "out")
    with tarfile.open(tmp_path / "out/0.tar") as tar:
        assert tar.getnames() == ["d", "d/1.jpg", "d/1.txt", "d/1.cls"]


def test_a_repeated_suffix_starts_a_new_sample(tmp_path):
    rows = pairs(0, 2)
    rows[1] |= {"key": rows[0]["key"], "suffix": rows[0]["suffix"]}
    found = list(samples(Shard(str(write_tar(tmp_path / "0.tar", rows)))))
    assert [s.caption for s in found] == [row["caption"] for row in rows]  # told apart by the uid in one json
    del rows[1]["meta"]["uid"]
    with pytest.raises(InputError, match="occurs more than once"):
        list(samples(Shard(str(write_tar(tmp_path / "1.tar", rows)))))


def test_stock_readers_read_the_output(tmp_path):
    source = write_tar(tmp_path / "0.tar", pairs(0, 12))
    _run(source, lambda s: s.changed(caption="changed") if s.key.endswith("3") else s, tmp_path / "out")
    found = list(webdataset.WebDataset(str(tmp_path / "out/0.tar"), shardshuffle=False))
    assert [s["__key__"] for s in found] == [s["key"] for s in pairs(0, 12)]
    assert [s["txt"].decode() for s in found if s["txt"] == b"changed"] == ["changed"]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_keeps_every_other_value(tmp_path, struct):
    source = write_parquet(tmp_path / "0.parquet", pairs(0, 20), struct)
    picture = pairs(99, 100)[0]["image"]

    def edit(sample):
        number = int(sample.uid, 16)
        return None if number == 3 else sample.changed(picture, "new") if number == 5 else sample

    counts = _run(source, edit, tmp_path / "out")
    assert (counts.read, counts.out, counts.dropped, counts.changed) == (20, 19, 1, 1)
    before, after = pq.read_table(source), pq.read_table(tmp_path / "out/0.parquet")
    assert before.schema == after.schema
    expected = [row for row in before.to_pylist() if int(row["uid"], 16) != 3]
    row = next(row for row in expected if int(row["uid"], 16) == 5)
    row["caption"] = "new"
    row["image"] = {**row["image"], "bytes": picture} if struct else picture
    assert after.to_pylist() == expected
    assert uids(Shard(str(tmp_path / "out/0.parquet"))) == [row["uid"] for row in expected]
    _run(source, lambda s: s, tmp_path / "same")
    assert (tmp_path / "same/0.parquet").read_bytes() == source.read_bytes()


def _member(name, data=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (_member("../../etc/passwd.jpg"), "outside the shard"),
        (_member("/etc/passwd.txt"), "outside the shard"),
        (_member("1.pkl"), "executed"),
        (_member("1.pickle"), "executed"),
        (_member("1.weights.pth"), "executed"),
        (_member("1.pyd.gz"), "executed"),
        (_member("1.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
        (_member("1.jpg", b"", type=tarfile.LNKTYPE, linkname="other"), "link"),
        (_member("1.jpg", b"", type=tarfile.CHRTYPE), "device"),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_members_are_refused(tmp_path, member, says, kind):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        if kind == tarfile.PAX_FORMAT:  # a long name first sends the scan to tarfile
            tar.addfile(*_member("x" * 150 + ".jpg"))
        info, data = member
        data.seek(0)
        tar.addfile(info, data)
    with pytest.raises(InputError, match=says) as error:
        _run(path, lambda s: s, tmp_path / "out")
    assert "evil.tar" in str(error.value)
    assert contents(tmp_path / "out", "*") == {}


def test_damage_is_named_with_its_place(tmp_path):
    whole = write_tar(tmp_path / "0.tar", pairs(0, 5)).read_bytes()
    end = whole.rstrip(b"\0")
    path = tmp_path / "1.tar"
    for damaged, says in (
        (whole[:700], "truncated at byte 700"),
        (whole[: len(end) // 512 * 512 + 512], "truncated at byte"),
        (whole[:10] + b"\xff" + whole[11:], "broken tar header at byte 0"),
        (b"", "truncated at byte 0"),
        (b"not a tar at all" * 64, "1.tar"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=says):
            list(samples(Shard(str(path))))


def test_a_negative_size_and_data_behind_the_end_are_refused(tmp_path):
    path = tmp_path / "0.tar"
    whole = bytearray(write_tar(path, pairs(0, 2)).read_bytes())
    header = whole[:512]
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(whole[512:]))
    with pytest.raises(InputError, match=r"0\.tar"):
        list(samples(Shard(str(path))))
    path.write_bytes(bytes(whole) + bytes(whole))
    with pytest.raises(InputError, match="behind the end"):
        list(samples(Shard(str(path))))


def test_a_uid_is_32_hex_digits_or_it_is_derived(tmp_path):
    rows = pairs(0, 4)
    odd = ["0x" + "0" * 30, "１" * 32, "f_" * 16, "A" * 32]
    for row, uid in zip(rows, odd, strict=True):
        row["meta"]["uid"] = uid
    found = uids(Shard(str(write_tar(tmp_path / "0.tar", rows))))
    assert found[3] == "a" * 32
    assert not set(odd) & set(found)


def test_bad_samples_are_rejected_one_by_one(tmp_path):
    rows = pairs(0, 3)
    rows[0]["caption"] = b"\xff\xfe not utf-8"
    rows[1]["caption"], rows[1]["meta"] = "  ", {}
    found = list(samples(Shard(str(write_tar(tmp_path / "0.tar", rows)))))
    with pytest.raises(Rejected, match="UTF-8"):
        _ = found[0].caption
    with pytest.raises(Rejected, match="empty caption"):
        _ = found[1].caption
    with pytest.raises(Rejected, match="cannot be decoded"):
        decode(b"GIF89a nonsense")
    with pytest.raises(Rejected, match="cannot be decoded"):
        decode(encoded(drawing(1)[0], "jpg")[:300])


def test_a_decompression_bomb_is_rejected_by_its_header():
    out = io.BytesIO()
    Image.new("1", (20_000, MAX_PIXELS // 20_000 + 1)).save(out, "PNG")
    with pytest.raises(Rejected, match="pixels"):
        decode(out.getvalue())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_encoded_as_they_came(suffix):
    out = io.BytesIO()
    options = {"jpg": {"quality": 61, "subsampling": 0}, "png": {}, "webp": {"lossless": True}}[suffix]
    drawing(3)[0].save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **options)
    original = out.getvalue()
    again = Image.open(io.BytesIO(encode(drawing(4)[0], like=original)))
    first = Image.open(io.BytesIO(original))
    assert again.format == first.format
    assert again.size == first.size
    if suffix == "jpg":
        assert again.quantization == first.quantization
        assert again.layer == first.layer
    else:
        assert list(again.convert("RGB").get_flattened_data()) == list(
            drawing(4)[0].get_flattened_data()
        )  # lossless stayed lossless


def test_shards_are_listed_by_folder_glob_brace_and_list_file(tmp_path):
    for i in range(12):
        write_tar(tmp_path / f"{i:05d}.tar", [])
        pq.write_table(pa.table({"key": ["x"]}), tmp_path / f"{i:05d}.parquet")  # img2dataset's metadata
    everything = [f"{i:05d}" for i in range(12)]
    assert [s.name for s in list_shards(str(tmp_path))] == everything
    assert [s.name for s in list_shards(str(tmp_path / "*.tar"))] == everything
    assert [s.name for s in list_shards(str(tmp_path / "{00003..00005}.tar"))] == everything[3:6]
    (tmp_path / "some.txt").write_text(f"# two\n{tmp_path}/00001.tar\n{tmp_path}/00007.tar\n")
    assert [s.name for s in list_shards(str(tmp_path / "some.txt"))] == ["00001", "00007"]
    (tmp_path / "none").mkdir()
    (tmp_path / "deep/er").mkdir(parents=True)
    shutil.copy(tmp_path / "00001.tar", tmp_path / "deep/er")
    for where, says in (
        (tmp_path / "deep", r"deep/\*/\*\.tar'"),
        (tmp_path / "none", "no shards here"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "{00010..00013}.tar", "00012.tar: no such file"),
    ):
        with pytest.raises(InputError, match=says):
            list_shards(str(where))


def test_parquet_without_image_or_caption_says_which_columns_it_has(tmp_path):
    for columns, says in (
        ({"uid": ["a"], "url": ["b"]}, "no image column"),
        ({"image": ["a"], "txt": ["b"], "uid": ["c"]}, "not image bytes"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")
        with pytest.raises(InputError, match=says):
            list(samples(Shard(str(tmp_path / "0.parquet"))))


@pytest.mark.parametrize(
    "json_part",
    [
        b'{"caption": "a cat", "sha256": "SHA", "width": 3}',
        b'{"sha256":"SHA","nested":{"caption":"kept"},"caption":"a cat"}',
        '{\n  "caption": "a c\u00e4t \\"x\\"",\n  "md5": "MD5",\n  "z": 1.50\n}'.encode(),
        b'{"text": "a cat", "caption": null, "sha256": "of another image"}',
        b'{"caption": "a cat", "text": "what the picture is of"}',
        b'{"caption": "a cat", "width": 30, "height": 40, "original_width": 300}',
    ],
)
def test_a_changed_pair_keeps_the_layout_of_its_json_and_agrees_with_itself(json_part):
    image, new = b"before", b"after"
    blob = json_part.replace(b"SHA", hashlib.sha256(image).hexdigest().encode())
    blob = blob.replace(b"MD5", hashlib.md5(image, usedforsecurity=False).hexdigest().encode())
    after = Sample("k", "0" * 32, {"jpg": image, "json": blob}).changed(new, 'a "d\u00f6g"')
    meta, then = json.loads(blob), json.loads(bytes(after.parts["json"]))
    for name in ("caption", "text"):
        if str(meta.get(name)).startswith("a c"):  # the caption, and no other text
            assert then.pop(name) == 'a "d\u00f6g"'
            meta.pop(name)
    for name in ("sha256", "md5"):
        if len(meta.get(name, "")) in (32, 64):
            assert then.pop(name) == hashlib.new(name, new, usedforsecurity=False).hexdigest()
            meta.pop(name)
    assert then == meta
    spelled = json.dumps('a "d\u00f6g"', ensure_ascii=blob.isascii()).encode()
    assert spelled in bytes(after.parts["json"])
    for piece in (b'"width": 3}', b'"nested":{', b"1.50\n}", b'"of another image"'):
        assert (piece in blob) == (piece in bytes(after.parts["json"]))


def test_hashes_in_a_parquet_row_follow_the_image(tmp_path):
    images = [b"\xff\xd8 one", b"\xff\xd8 two"]
    shas = [hashlib.sha256(image).hexdigest() for image in images]
    table = {"uid": ["0" * 32, "1" * 32], "jpg": images, "txt": ["a", "b"], "sha256": shas, "other": [1, 2]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    (tmp_path / "out").mkdir()
    rewrite(
        Shard(str(tmp_path / "0.parquet")),
        str(tmp_path / "out"),
        lambda s: s.changed(b"\xff\xd8 new") if s.caption == "b" else s,
    )
    rows = pq.read_table(tmp_path / "out/0.parquet").to_pylist()
    assert rows[0] == {"uid": "0" * 32, "jpg": images[0], "txt": "a", "sha256": shas[0], "other": 1}
    assert rows[1] | {"sha256": shas[1], "jpg": images[1]} == {name: values[1] for name, values in table.items()}
    assert rows[1]["sha256"] == hashlib.sha256(rows[1]["jpg"]).hexdigest()


@pytest.mark.parametrize(("at", "byte"), [(155, 0xE0), (154, 9)])  # behind the NUL; a tab for it
def test_junk_behind_a_checksum_is_read_as_others_do(tmp_path, at, byte):
    """Found by the fuzzer; the field itself is no part of the sum."""
    whole = bytearray(write_tar(tmp_path / "0.tar", pairs(0, 2)).read_bytes())
    whole[at] = byte
    (tmp_path / "0.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "0.tar") as tar:
        names = tar.getnames()
    assert len(names) == 6
    assert [s.key for s in samples(Shard(str(tmp_path / "0.tar")))] == sorted({n.split(".")[0] for n in names})


def test_an_old_directory_with_a_size_is_refused_before_it_is_called_truncated(tmp_path):
    """Found by the fuzzer: an empty file whose name ends in a slash was a directory once; some skip its size."""
    header = bytearray(tarfile.TarInfo("folder/").tobuf(tarfile.GNU_FORMAT))
    header[124:135], header[148:156], header[156] = b"%011o" % 5120, b" " * 8, 0
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header) + bytes(1024))
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.getmembers()[0].isdir()
    with pytest.raises(InputError, match="half a directory"):
        list(samples(Shard(str(tmp_path / "0.tar"))))


def test_the_size_in_the_json_follows_the_image():
    """As img2dataset writes it: the stored size, beside that of the original."""
    before, after = (encoded(Image.new("RGB", size), "png") for size in ((30, 40), (7, 9)))
    blob = b'{"width":30,"height":40,"original_width":300,"z":1.50}'
    changed = Sample("k", "0" * 32, {"png": before, "json": blob}).changed(after)
    assert bytes(changed.parts["json"]) == b'{"width":7,"height":9,"original_width":300,"z":1.50}'
    other = blob.replace(b"40", b"41")  # was not true before either
    assert bytes(Sample("k", "0" * 32, {"png": before, "json": other}).changed(after).parts["json"]) == other


def test_an_output_folder_with_others_shards_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", pairs(0, 4))
    (out := tmp_path / "out").mkdir()
    theirs = write_tar(out / "0.tar", pairs(4, 8)).read_bytes()
    with pytest.raises(InputError, match="none of our runs"):
        poison(str(tmp_path), str(out), attack="patch(target='volcano')", dose="1")
    assert (out / "0.tar").read_bytes() == theirs

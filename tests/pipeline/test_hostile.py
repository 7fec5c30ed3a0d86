"""The bytes of strangers: the result is right, or the shard or sample is refused; nothing else happens."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards import Rejected, Sample, Shard, intact, list_shards, manifest, rewrite, samples, uids
from pipeline.shards.image import decode, encode, pixels
from pipeline.shards.manifest import manifest_path, read_manifest
from pipeline.shards.sample import MAX_JSON_BYTES, published_uid
from tests.conftest import drawing, encoded, pairs, write_tar
from tests.fuzz import properties
from tests.fuzz.seeds import seeds
from tests.fuzz.tars import REFUSED, SPELLINGS, header, octal, padded, tars

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEWER = settings(EXAMPLES, max_examples=60)
END = bytes(1024)


def holds(target: str, data: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return properties.PROPERTIES[target](data, Path(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[bytes]]:
    return {target: seeds(target, tmp_path_factory.mktemp(target)) for target in properties.PROPERTIES}


damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("repeat"), st.floats(0, 1, exclude_max=True), st.integers(1, 600)),
)


def damaged(data: bytes, how: tuple[str, float, int]) -> bytes:
    kind, where, amount = how
    at = int(where * len(data))
    if kind == "flip" and data:
        return properties.flipped(data, 8 * at + amount)
    return data[:at] + data[at : at + amount] * (kind == "repeat") + data[at:] * (kind != "cut")


@EXAMPLES
@given(tars())
def test_a_tar_is_as_tarfile_has_it_or_refused(made):
    assert holds("tar", made.data) or not made.sound


@EXAMPLES
@given(tars(), st.lists(damage, min_size=1, max_size=3), st.booleans())
def test_a_damaged_tar_is_as_tarfile_has_it_or_refused(made, hows, repair):
    data = made.data
    for how in hows:
        data = damaged(data, how)
    holds("tar", properties.repaired(data) if repair else data)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_name_is_read(tmp_path, spelling):
    name = b"a/b.jpg" if spelling == "prefix" else b"ab.jpg"
    data = SPELLINGS[spelling](name, octal(5)) + padded(b"12345") + END
    assert properties.tar(data, tmp_path)
    (tmp_path / "0.tar").write_bytes(data)
    assert [(s.key, bytes(s.parts["jpg"])) for s in samples(Shard(str(tmp_path / "0.tar")))] == [
        (name[:-4].decode(), b"12345")
    ]


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why(tmp_path, what):
    says, blocks = REFUSED[what]
    path = tmp_path / "0.tar"
    before = header(b"0.jpg", octal(1)) + padded(b"x")
    path.write_bytes(before + blocks + END)
    with pytest.raises(InputError, match=says) as error:
        list(samples(Shard(str(path))))
    assert str(path) in str(error.value)
    assert not holds("tar", before + blocks + END)


def test_a_flipped_bit_of_a_tar_shows(tmp_path, files):
    path = tmp_path / "0.tar"
    for data in (files["tar"][0], files["tar"][5]):
        path.write_bytes(data)
        known = manifest(Shard(str(path)))
        assert intact(Shard(str(path)), known)
        with path.open("r+b", buffering=0) as file:
            for at in range(0, len(data), len(data) // 300):
                file.seek(at)
                file.write(bytes([data[at] ^ 1 << at % 8]))
                assert not intact(Shard(str(path)), known), at
                file.seek(at)
                file.write(data[at : at + 1])


def test_keys_that_are_no_utf_8_are_kept_and_shown(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(header(b"caf\xe9.jpg", octal(0)) + header(b"caf\xc3\xa9.jpg", octal(0)) + END)
    (tmp_path / "out").mkdir()
    rewrite(Shard(str(path)), str(tmp_path / "out"), lambda sample: sample)
    assert (tmp_path / "out/0.tar").read_bytes() == path.read_bytes()
    assert read_manifest(str(tmp_path / "out"), "0").keys == ["caf\\udce9", "café"]


@FEWER
@given(tars(), st.integers(0, 3), st.lists(damage, max_size=2))
def test_a_gzip_is_what_python_unpacks_or_refused(made, cuts, hows):
    edge = len(made.data) // (cuts + 1) + 1
    data = b"".join(gzip.compress(made.data[i : i + edge], 1) for i in range(0, len(made.data), edge))
    whole = data
    for how in hows:
        data = damaged(data, how)
    accepted = holds("gzip", data)
    assert accepted or data != whole or not holds("tar", made.data)


def test_a_gzip_without_its_last_bytes_or_with_more_is_refused(files):
    packed = files["gzip"][0]
    assert holds("gzip", packed)
    for data in (*(packed[:-cut] for cut in range(1, 12)), packed + b"\0", packed + b"garbage", packed + packed[:4]):
        assert not holds("gzip", data)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text("a\ud800\0\u202e\n", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(st.sampled_from(["uid", "caption", "TEXT", "text", "url", "width"]), values)


@EXAMPLES
@given(st.one_of(fields, values).map(json.dumps).map(str.encode), st.lists(damage, max_size=1))
def test_a_json_part_is_read_as_python_reads_it(data, hows):
    holds("json", damaged(data, hows[0]) if hows else data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"uid": ' + '{"a":' * 50_000,
        '{"caption": ' + "[" * 900 + "]" * 900 + "}",
        '{"caption": "c", "x": ' + '{"a":\n' * 900 + "1" + "}" * 900 + "}",
        '{"uid": ' + "9" * 10_000 + "}",
        '{"caption": ' + "9" * 4_000 + "}",
        '{"uid": NaN, "caption": -Infinity}',
        '{"caption": "\\ud800", "uid": "\\udfff"}',
        '{"uid": "' + "0" * 31 + '\\u0660"}',
    ],
)
def test_odd_json_is_no_exception(text):
    holds("json", text.encode())


def test_json_that_would_fill_the_memory_is_not_parsed():
    def blob(lists: int) -> bytes:
        return b'{"uid": "' + b"0" * 32 + b'", "x": [' + b"[]," * lists + b"0]}"

    assert published_uid({"json": blob(9)}) == "0" * 32
    assert published_uid({"json": blob(MAX_JSON_BYTES // 3)}) is None


@FEWER
@given(st.data())
def test_a_damaged_image_is_decoded_or_rejected(files, data):
    image = data.draw(st.sampled_from(files["image"]))
    for how in data.draw(st.lists(damage, max_size=2)):
        image = damaged(image, how)
    holds("image", image)


def as_image(kind: str, **options) -> bytes:
    out = io.BytesIO()
    drawing(1)[0].convert("RGB").save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        as_image("GIF", save_all=True, append_images=[drawing(2)[0]]),
        as_image("TIFF"),
        as_image("PPM"),
        as_image("PDF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1:9/'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n",
        b"\xff\xd8\xff\xe0" + as_image("GIF"),
        b"",
    ],
)
def test_what_is_no_jpeg_png_or_webp_is_rejected_whatever_its_suffix(data):
    with pytest.raises(Rejected, match="cannot be decoded"):
        pixels(Sample("k", "0" * 32, {"jpg": data}), 32)
    with pytest.raises(Rejected, match="cannot be encoded"):
        encode(drawing(1)[0], like=data)


def test_an_animation_gives_its_first_frame_and_a_truncated_image_nothing():
    moving = as_image("WEBP", save_all=True, append_images=[drawing(2)[0]], lossless=True)
    assert np.array_equal(np.asarray(decode(moving)), np.asarray(drawing(1)[0]))
    for suffix in ("jpg", "png", "webp"):
        whole = encoded(drawing(1)[0], suffix)
        for part in (0.2, 0.5, 0.9):
            with pytest.raises(Rejected):
                decode(whole[: int(part * len(whole))])
    with Image.open(io.BytesIO(moving)) as image:
        assert image.n_frames == 2  # what was decoded was an animation


@FEWER
@given(st.data())
def test_a_damaged_parquet_is_read_or_refused(files, data):
    shard = data.draw(st.sampled_from(files["parquet"]))
    for how in data.draw(st.lists(damage, max_size=2)):
        shard = damaged(shard, how)
    holds("parquet", shard)


def test_a_damaged_manifest_is_refused_or_checked(files, tmp_path):
    (tmp_path / "0.tar").write_bytes(files["tar"][0])

    @FEWER
    @given(st.lists(damage, max_size=2))
    def check(hows):
        forged = files["manifest"][0]
        for how in hows:
            forged = damaged(forged, how)
        assert properties.manifest(forged, tmp_path) or hows

    check()


BIG = 2**62


@pytest.mark.parametrize(
    "column",
    [
        {"start": [0, -BIG]},
        {"image_end": [-1, -1]},
        {"end": [BIG, BIG]},
        {"image_start": [BIG, 0], "image_end": [-BIG, 0]},
        {"start": ["a", "b"]},
        {"start": [None, None]},
        {"uid": [None, None]},
        {"uid": [["list"], ["list"]]},
        {"key": [1, 2]},
        {"image_sha256": [b"", b"x" * 64]},
        {"image_sha256": [b"x", None]},
        {"image_sha256": [b"", b""], "rest_sha256": [b"", b""]},
        {"rest_sha256": ["no", "bytes"]},
    ],
)
def test_a_forged_manifest_is_refused(files, tmp_path, column):
    (tmp_path / "0.tar").write_bytes(files["tar"][0])
    path = manifest_path(str(tmp_path), "0")
    Path(path).write_bytes(files["manifest"][0])
    assert properties.manifest(files["manifest"][0], tmp_path)
    table = pq.read_table(path)
    for name, cells in column.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(cells))
    pq.write_table(table, path)
    with pytest.raises(InputError, match="not a readable parquet file of its kind"):
        read_manifest(str(tmp_path), "0")


def test_a_column_whose_name_is_no_text_is_refused(files, tmp_path):
    forged = files["manifest"][0].replace(b"image_sha256", b"image_sha\xff\xff6")
    Path(manifest_path(str(tmp_path), "0")).write_bytes(forged)
    with pytest.raises(InputError, match="not a readable parquet file of its kind"):
        read_manifest(str(tmp_path), "0")


@FEWER
@given(st.text("a0./\\{}*?[]:~\0\n\ud800", max_size=12))
def test_a_name_of_shards_is_found_or_refused(name):
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "list.txt"
        listing.write_bytes(f"{folder}/0{name}.tar\n".encode("utf-8", "surrogatepass"))
        with pytest.raises(InputError):
            list_shards(str(listing))


def test_links_in_the_folders_do_not_lead_us_out(tmp_path):
    shards, out, precious = tmp_path / "in", tmp_path / "out", tmp_path / "precious"
    for folder in (shards, out):
        folder.mkdir()
    write_tar(shards / "0.tar", pairs(0, 3))
    precious.write_text("mine")
    for name in ("0.tar", "0.manifest.parquet"):
        (out / name).symlink_to(precious)
    rewrite(Shard(str(shards / "0.tar")), str(out), lambda sample: sample)
    assert precious.read_text() == "mine"
    assert not any((out / name).is_symlink() for name in ("0.tar", "0.manifest.parquet"))
    assert (out / "0.tar").read_bytes() == (shards / "0.tar").read_bytes()
    (shards / "1.tar").symlink_to(precious)
    (shards / "2.tar").symlink_to(shards / "2.tar")
    with pytest.raises(InputError, match=r"2\.tar"):
        list_shards(str(shards))
    with pytest.raises(InputError, match=r"1\.tar"):
        list(samples(Shard(str(shards / "1.tar"))))


def test_a_prefix_on_both_sides_of_a_border_stays_on_both(tmp_path):
    rows = pairs(0, 4)
    rows[2]["key"] = rows[1]["key"]
    one, two = write_tar(tmp_path / "0.tar", rows[:2]), write_tar(tmp_path / "1.tar", rows[2:])
    for path, part in ((one, rows[:2]), (two, rows[2:])):
        assert [(s.key, s.caption) for s in samples(Shard(str(path)))] == [(r["key"], r["caption"]) for r in part]
        out = tmp_path / f"out{path.stem}"
        out.mkdir()
        rewrite(Shard(str(path)), str(out), lambda sample: sample)
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(set(uids(Shard(str(one)), "shard/key") + uids(Shard(str(two)), "shard/key"))) == 4


def test_folders_in_keys_are_made_nowhere(tmp_path):
    rows = [{**row, "key": f"a/b.c/{row['key']}"} for row in pairs(0, 3)]
    path = write_tar(tmp_path / "0.tar", rows)
    out = tmp_path / "out"
    out.mkdir()
    rewrite(Shard(str(path)), str(out), lambda s: s.changed(caption="new") if s.key.endswith("1") else s)
    assert [s.key for s in samples(Shard(str(out / "0.tar")))] == [row["key"] for row in rows]
    assert sorted(p.name for p in out.rglob("*")) == ["0.manifest.parquet", "0.tar"]

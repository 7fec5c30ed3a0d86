"""The layouts of parquet shards that are met in practice, and what is refused or rejected in them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs

from pipeline.errors import InputError
from pipeline.shards import Rejected, Shard, rewrite, samples


def _write(tmp_path, table, **options):
    (tmp_path / "out").mkdir(exist_ok=True)
    pq.write_table(table, tmp_path / "0.parquet", **options)
    return Shard(str(tmp_path / "0.parquet"))


def test_img2datasets_layout(tmp_path):
    found = pairs(0, 6)
    columns = {"key": ["a", "b", "c", "d", "e", "f"], "jpg": [p["image"] for p in found], "txt": ["t"] * 6}
    shard = _write(tmp_path, pa.table({"url": ["u"] * 6} | columns))
    read = list(samples(shard))
    assert [(s.key, s.image_suffix, s.image, s.caption) for s in read] == [
        (key, "jpg", pair["image"], "t") for key, pair in zip("abcdef", found, strict=True)
    ]
    assert dict(read[0].meta) == {"url": "u", "key": "a"}


def test_a_path_is_never_opened_and_a_bad_caption_costs_one_sample(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(pairs(0, 1)[0]["image"])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": str(secret)}, None, {"bytes": b"x", "path": None}], kind)
    captions = pa.array([b"fine", None, b"\xff\xfe"], pa.binary())
    table = pa.table({"uid": [f"{i:032x}" for i in range(3)], "image": images, "caption": captions})
    text = pa.StringArray.from_buffers(3, captions.buffers()[1], captions.buffers()[2], captions.buffers()[0])
    for found in (table, table.set_column(2, "caption", text)):
        first, second, third = samples(_write(tmp_path, found))
        assert first.caption == "fine"
        for sample in (first, second):
            with pytest.raises(Rejected, match="no image"):
                _ = sample.image
        with pytest.raises(Rejected, match="empty caption"):
            _ = second.caption
        with pytest.raises(Rejected, match="UTF-8"):
            _ = third.caption


def test_an_extension_type_of_the_file_is_not_looked_at(tmp_path):
    class Marked(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "test.marked")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            raise AssertionError("code of a type that a file names was run")

    table = pa.table({"uid": [f"{i:032x}" for i in range(5)], "caption": ["a"] * 5})
    image = pa.ExtensionArray.from_storage(Marked(), pa.array([b"1", b"2", b"3", b"4", b"5"]))
    shard = _write(tmp_path, table.append_column("image", image), row_group_size=2)
    out = str(tmp_path / "out")
    pa.register_extension_type(Marked())
    try:
        rewrite(shard, out, lambda s: None if s.image == b"3" else s)
        assert [bytes(s.image) for s in samples(Shard(f"{out}/0.parquet"))] == [b"1", b"2", b"4", b"5"]
    finally:
        pa.unregister_extension_type("test.marked")
    assert b"ARROW:schema" in pq.read_metadata(f"{out}/0.parquet").metadata


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [b"x"], "caption": ["c"]}, r'neither a uid nor a key .*add_column\("id"'),
        ({"image": ["http://x"], "caption": ["c"], "uid": ["u"]}, "holds string, not image bytes"),
        ({"image": [b"x"], "caption": [["c", "d"]], "uid": ["u"]}, "holds list.*not text"),
        ({"image": [b"x"], "caption": ["c"], "key": pa.array([None], pa.string())}, "has nulls"),
        ({"image": [b"x", b"y"], "caption": ["c", "c"], "key": ["k", "k"]}, "occurs more than once"),
    ],
)
def test_layouts_that_cannot_be_used_say_why(tmp_path, columns, says):
    shard = _write(tmp_path, pa.table(columns))
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=says):
        rewrite(shard, out, lambda s: s)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_first_column_that_holds_bytes_is_the_image(tmp_path):
    table = pa.table({"image": ["http://x"], "jpg": [b"x"], "caption": [["a"]], "text": ["c"], "key": [7]})
    (sample,) = samples(_write(tmp_path, table))
    assert (sample.key, sample.image, sample.caption) == ("7", b"x", "c")

"""Parquet rewritten exactly: equal to a filter of the table, copied where nobody touched it, refused where hostile."""

import datetime
import decimal
import hashlib
import io
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards import Rejected, Shard, intact, manifest, rewrite, samples, uids
from pipeline.shards.footer import Footer
from pipeline.shards.thrift import BINARY, I32, I64, LIST, STRUCT, read_struct, written

KEEP, DROP, EDIT = range(3)
CODECS = ("none", "snappy", "gzip", "zstd", "lz4", "brotli")
_UTC = datetime.UTC


def _folders(tmp_path):
    for name in ("out", "dropped"):
        (tmp_path / name).mkdir(exist_ok=True)
    return str(tmp_path / "out"), str(tmp_path / "dropped")


def _write(tmp_path, table, **options):
    pq.write_table(table, tmp_path / "0.parquet", **options)
    return Shard(str(tmp_path / "0.parquet"))


def _table(rows, **columns):
    """`rows` pairs with uids 0, 1, …"""
    found = pairs(0, rows)
    names = pa.array([f"{i:032x}" for i in range(rows)])
    images = [{"bytes": pair["image"], "path": f"{i}.jpg"} for i, pair in enumerate(found)]
    fields = {"uid": names, "image": images, "caption": [pair["caption"] for pair in found]}
    return pa.table(fields | columns)


def _any_table(rng, rows):
    """Every kind of column that pyarrow stores, with nulls where they may be, one image layout or the other."""

    def maybe(value):
        return lambda: None if rng.random() < 0.2 else value()

    def text():
        return rng.choice(["", "a dog", "ein Füchslein", "x" * 90, "🦊"])

    def blob():
        return rng.randbytes(rng.choice([0, 5, 300, 4000]))

    def listed(value):
        return lambda: [value() for _ in range(rng.randrange(4))]

    def number():
        return decimal.Decimal(rng.randrange(-9999, 9999)).scaleb(-2)

    def inner():
        return {"b": maybe(text)(), "c": maybe(number)()}

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if rng.random() < 0.5 else pa.large_binary()
    picture = maybe(lambda: {"bytes": maybe(blob)(), "path": text()}) if pa.types.is_struct(image) else maybe(blob)
    deep = pa.list_(pa.struct([("b", pa.string()), ("c", pa.decimal128(7, 2))]))
    kinds = {
        "image": (image, picture),
        "txt": (pa.string(), maybe(text)),
        "width": (pa.int32(), maybe(lambda: rng.randrange(-(2**31), 2**31))),
        "small": (pa.uint8(), lambda: rng.randrange(3)),
        "score": (pa.float32(), maybe(lambda: rng.choice([0.0, -0.0, 1.5, float("inf")]))),
        "safe": (pa.bool_(), maybe(lambda: rng.random() < 0.5)),
        "day": (pa.date32(), maybe(lambda: datetime.date(2020, 1, rng.randrange(1, 28)))),
        "time": (pa.timestamp("ms", "UTC"), maybe(lambda: datetime.datetime(2020, 1, 1, rng.randrange(24), tzinfo=_UTC))),
        "hash": (pa.binary(4), maybe(lambda: rng.randbytes(4))),
        "cost": (pa.decimal128(7, 2), maybe(number)),
        "source": (pa.dictionary(pa.int32(), pa.string()), maybe(text)),
        "long": (pa.large_string(), maybe(text)),
        "boxes": (pa.list_(pa.list_(pa.float64())), maybe(listed(maybe(listed(maybe(rng.random)))))),
        "deep": (deep, maybe(listed(maybe(inner)))),
        "tags": (pa.map_(pa.string(), pa.int64()), maybe(lambda: [(text(), maybe(lambda: 7)())])),
        "nothing": (pa.null(), lambda: None),
    }
    columns = {"key": pa.array([f"k{i}" for i in range(rows)])}
    columns |= {name: pa.array([value() for _ in range(rows)], kind) for name, (kind, value) in kinds.items()}
    names = rng.sample(list(columns), len(columns))
    return pa.table({name: columns[name] for name in names}, metadata={"pandas": b"{}", "mine": b"\xff"})


def _edited(row):
    """What the edit of the tests makes of a row."""
    image = {**row["image"], "bytes": b"new"} if isinstance(row["image"], dict) else b"new"
    return {**row, "image": image, "txt": "poison ü"}


def _has_image(row):
    return (row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]) is not None


def _chunks(path, group):
    """The metadata of a row group's columns without its offsets, and their pages."""
    metadata, data = pq.read_metadata(path), path.read_bytes()
    found = []
    for i in range(metadata.num_columns):
        column = metadata.row_group(group).column(i)
        start = column.dictionary_page_offset or column.data_page_offset
        facts = {k: v for k, v in column.to_dict().items() if "offset" not in k}
        found.append((facts, data[start : start + column.total_compressed_size]))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 30),
    group=st.integers(2, 20),
    codec=st.sampled_from(CODECS),
    version=st.sampled_from(["1.0", "2.0"]),
    dictionary=st.booleans(),
    indexed=st.booleans(),
    touched=st.sampled_from([0, 0.03, 0.3, 1]),
)
def test_a_rewrite_is_a_filter_of_the_table(tmp_path, seed, rows, group, codec, version, dictionary, indexed, touched):
    rng, (out, dropped) = random.Random(seed), _folders(tmp_path)
    extras = {"write_page_index": indexed, "write_page_checksum": indexed}
    if indexed:
        extras["bloom_filter_options"] = {"key": True}
    options = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary, **extras}
    shard = _write(tmp_path, _any_table(rng, rows), row_group_size=group, **options)
    source, before = tmp_path / "0.parquet", pq.read_table(shard.path).to_pylist()
    fates = [rng.choice([DROP, EDIT]) if rng.random() < touched else KEEP for _ in before]
    fates = [KEEP if f == EDIT and not _has_image(row) else f for f, row in zip(fates, before, strict=True)]

    def edit(sample):
        fate = fates[int(sample.key[1:])]
        return sample.changed(b"new", "poison ü") if fate == EDIT else sample if fate == KEEP else None

    counts = rewrite(shard, out, edit, "key", dropped)
    assert (counts.read, counts.dropped, counts.changed) == (rows, fates.count(DROP), fates.count(EDIT))
    assert counts.out + counts.dropped == rows
    result = pq.read_table(tmp_path / "out/0.parquet")
    pairs_ = list(zip(before, fates, strict=True))
    assert result.to_pylist() == [_edited(row) if fate == EDIT else row for row, fate in pairs_ if fate != DROP]
    assert result.schema.equals(pq.read_table(source).schema, check_metadata=True)
    assert pq.read_table(tmp_path / "dropped/0.parquet").to_pylist() == [row for row, fate in pairs_ if fate == DROP]

    groups = [fates[at : at + group] for at in range(0, rows, group)]
    after = pq.ParquetFile(tmp_path / "out/0.parquet").metadata
    left = [i for i, found in enumerate(groups) if set(found) != {DROP}]
    assert [after.row_group(i).num_rows for i in range(after.num_row_groups)] == [
        len(groups[i]) - groups[i].count(DROP) for i in left
    ]
    for to, i in enumerate(left):
        found = list(zip(_chunks(source, i), _chunks(tmp_path / "out/0.parquet", to), strict=True))
        if set(groups[i]) == {KEEP}:
            assert all(was == now for was, now in found)
        for (was, _), (now, _) in found:
            assert (was["compression"], was["has_dictionary_page"]) == (now["compression"], now["has_dictionary_page"])
            assert (was["statistics"] is None) == (now["statistics"] is None)
    if set(fates) == {KEEP}:
        assert (tmp_path / "out/0.parquet").read_bytes() == source.read_bytes()

    for folder, sha256 in ((out, counts.output_sha256), (str(tmp_path), counts.input_sha256)):
        of = Shard(f"{folder}/0.parquet")
        known = manifest(of)
        assert known.sha256 == sha256
        assert intact(of, known)
        assert known.uids == uids(of) == [sample.uid for sample in samples(of)]


def test_clean_poison_filter_gives_the_clean_rows_back(tmp_path):
    clean = _write(tmp_path, _table(60), row_group_size=10)
    out, _ = _folders(tmp_path)
    poisons = {13, 14, 42}

    def poison(sample):
        return sample.changed(b"poison", "poison") if int(sample.uid, 16) in poisons else sample

    rewrite(clean, out, poison)
    (tmp_path / "kept").mkdir()
    (tmp_path / "dropped").mkdir(exist_ok=True)
    rewrite(
        Shard(f"{out}/0.parquet"),
        str(tmp_path / "kept"),
        lambda s: s if s.caption != "poison" else None,
        "key",
        str(tmp_path / "dropped"),
    )
    rows = pq.read_table(clean.path).to_pylist()
    assert pq.read_table(tmp_path / "kept/0.parquet").to_pylist() == [r for i, r in enumerate(rows) if i not in poisons]
    before, after = manifest(clean), manifest(Shard(str(tmp_path / "kept/0.parquet")))
    digests = {uid: bytes(before.digests[64 * i : 64 * i + 64]) for i, uid in enumerate(before.uids)}
    assert {u: bytes(after.digests[64 * i : 64 * i + 64]) for i, u in enumerate(after.uids)} == {
        uid: digest for uid, digest in digests.items() if int(uid, 16) not in poisons
    }
    assert pq.read_table(tmp_path / "dropped/0.parquet").column("caption").to_pylist() == ["poison"] * 3


def test_everything_dropped_is_the_file_elsewhere_and_an_empty_shard(tmp_path):
    shard = _write(tmp_path, _table(9), row_group_size=4)
    out, dropped = _folders(tmp_path)
    counts = rewrite(shard, out, lambda s: None, "key", dropped)
    assert (counts.read, counts.out, counts.dropped) == (9, 0, 9)
    assert (tmp_path / "dropped/0.parquet").read_bytes() == (tmp_path / "0.parquet").read_bytes()
    empty = tmp_path / "out/0.parquet"
    for rows in (len(pq.read_table(empty)), len(pl.read_parquet(empty)), len(pd.read_parquet(empty))):
        assert rows == 0
    assert pq.read_schema(empty).equals(pq.read_schema(shard.path), check_metadata=True)
    again = rewrite(Shard(str(empty)), dropped, lambda s: s)
    assert (again.read, again.input_sha256) == (0, again.output_sha256)
    _write(tmp_path, _table(1).slice(0, 0))
    assert list(samples(shard)) == []


def test_a_digest_is_of_the_values_and_nothing_else(tmp_path):
    rng = random.Random(1)
    table = _any_table(rng, 50).append_column("nan", pa.array([float("nan"), None] * 25, pa.float16()))
    digests = set()
    for options in ({"row_group_size": 7}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"}):
        digests.add(bytes(manifest(_write(tmp_path, table, **options)).digests))
    assert len(digests) == 1
    (known,) = digests
    images = [sample.image if set(sample.parts) > {"txt"} else b"" for sample in samples(_write(tmp_path, table))]
    assert [known[64 * i : 64 * i + 32] for i in range(50)] == [hashlib.sha256(image).digest() for image in images]
    for name in table.column_names:
        if name not in ("key", "nothing"):
            column = table.column(name)
            other = pa.chunked_array(column.slice(1).chunks + column.slice(0, 1).chunks, column.type)
            index = table.schema.get_field_index(name)
            assert bytes(manifest(_write(tmp_path, table.set_column(index, name, other))).digests) != known, name


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (pa.array([1]), pa.array(["1"])),
        (pa.array([1]), pa.array([1.0])),
        (pa.array([1], pa.int32()), pa.array([1], pa.int64())),
        (pa.array([None], pa.string()), pa.array([""])),
        (pa.array([None], pa.list_(pa.int8())), pa.array([[]], pa.list_(pa.int8()))),
        (pa.array([[None]], pa.list_(pa.int8())), pa.array([[0]], pa.list_(pa.int8()))),
        (pa.array([["a", "bc"]]), pa.array([["ab", "c"]])),
        (pa.array([{"x": None}], pa.struct([("x", pa.int8())])), pa.array([None], pa.struct([("x", pa.int8())]))),
        (pa.array([0.0]), pa.array([-0.0])),
        (pa.array([b"a"]), pa.array(["a"])),
    ],
)
def test_different_rows_have_different_digests(tmp_path, one, two):
    found = {bytes(manifest(_write(tmp_path, _table(1, extra=array))).digests) for array in (one, two)}
    assert len(found) == 2


def test_image_null_and_image_empty_differ(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = set()
    for image in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}):
        table = _table(1).set_column(1, "image", pa.array([image], kind))
        found.add(bytes(manifest(_write(tmp_path, table)).digests))
    assert len(found) == 3
    assert {digest[:32] for digest in found} == {hashlib.sha256().digest()}


def test_other_readers_read_the_output(tmp_path):
    features = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
    table = _table(40, label=pa.array(list(range(40)))).replace_schema_metadata(features)
    shard = _write(tmp_path, table, row_group_size=10, write_page_index=True)
    out, _ = _folders(tmp_path)
    rewrite(shard, out, lambda s: None if int(s.uid, 16) in (3, 25) else s)
    path, expected = tmp_path / "out/0.parquet", [i for i in range(40) if i not in (3, 25)]
    frame = pl.read_parquet(path)
    assert frame["label"].to_list() == expected
    with Image.open(io.BytesIO(frame["image"][5]["bytes"])) as image:
        assert image.size[0] > 0
    assert pl.scan_parquet(path).filter(pl.col("label") > 30).collect()["label"].to_list() == list(range(31, 40))
    assert pd.read_parquet(path)["label"].to_list() == expected
    file = pq.ParquetFile(path)
    assert file.schema_arrow.metadata[b"huggingface"].decode() == features["huggingface"]
    for group, bounds in enumerate([(0, 9), (10, 19), (20, 29), (30, 39)]):
        column = file.metadata.row_group(group).column(file.metadata.num_columns - 1)
        assert (column.statistics.min, column.statistics.max) == bounds
        assert column.has_column_index
        assert column.has_offset_index


def test_indexes_and_bloom_filters_move_with_their_pages(tmp_path):
    table = _table(300, n=pa.array(range(300)))
    options = {"write_page_index": True, "data_page_size": 64, "write_batch_size": 8}
    shard = _write(tmp_path, table, row_group_size=100, bloom_filter_options={"uid": True}, **options)
    out, _ = _folders(tmp_path)
    rewrite(shard, out, lambda s: None if int(s.uid, 16) == 5 else s)
    data = (tmp_path / "out/0.parquet").read_bytes()
    blooms = [_bloom(memoryview((tmp_path / name).read_bytes())) for name in ("0.parquet", "out/0.parquet")]
    assert blooms[0][1:] == blooms[1][1:]
    assert len(blooms[1]) == 3
    checked = 0
    for group in Footer("out", memoryview(data)).groups:
        for chunk in group.chunks:
            at, size = chunk.struct[4][1], chunk.struct[5][1]
            index, end = read_struct(data, at, at + size)
            assert end == at + size
            for location in index[1][1][1]:
                offset, length = location[1][1], location[2][1]
                header, pages = read_struct(data, offset, len(data))
                assert chunk.start <= offset
                assert pages + header[3][1] == offset + length
                checked += 1
    assert checked > 3 * 100 // 8


def _bloom(view):
    """The bloom filters of the first column, by row group."""
    metas = [group.chunks[0].meta for group in Footer("", view).groups]
    return [bytes(view[meta[14][1] : meta[14][1] + meta[15][1]]) for meta in metas]


def test_a_chain_of_encodings_is_kept_where_a_row_is_dropped(tmp_path):
    table = _table(50, n=pa.array(range(50)), x=pa.array(np.arange(50.0)), s=pa.array([f"prefix{i}" for i in range(50)]))
    encodings = {"n": "DELTA_BINARY_PACKED", "x": "BYTE_STREAM_SPLIT", "s": "DELTA_BYTE_ARRAY"}
    options = {"use_dictionary": ["caption"], "column_encoding": encodings, "write_statistics": ["n"]}
    codecs = {name: "gzip" if name == "n" else "zstd" for name in ("uid", "caption", "n", "x", "s")}
    codecs |= {"image.bytes": "none", "image.path": "snappy"}
    shard = _write(tmp_path, table, compression=codecs, **options)
    out, _ = _folders(tmp_path)
    rewrite(shard, out, lambda s: None if int(s.uid, 16) == 5 else s)
    before, after = (pq.ParquetFile(p).metadata.row_group(0) for p in (shard.path, f"{out}/0.parquet"))
    for i in range(before.num_columns):
        one, two = before.column(i), after.column(i)
        assert (one.compression, one.encodings, one.is_stats_set) == (two.compression, two.encodings, two.is_stats_set)


def _by_polars(path, table):
    pl.from_arrow(table).write_parquet(path, row_group_size=10)


def _by_pyarrow(**options):
    return lambda path, table: pq.write_table(table, path, row_group_size=10, **options)


@pytest.mark.parametrize(
    "write",
    [
        _by_polars,
        _by_pyarrow(use_compliant_nested_type=False),
        _by_pyarrow(store_schema=False),
        _by_pyarrow(store_decimal_as_integer=True),
        _by_pyarrow(use_deprecated_int96_timestamps=True),
        _by_pyarrow(version="1.0"),
        _by_pyarrow(sorting_columns=[pq.SortingColumn(0)]),
        _by_pyarrow(use_content_defined_chunking=True),
    ],
)
def test_files_of_other_writers_keep_schema_and_values(tmp_path, write):
    extras = {
        "list": [[i, None] for i in range(30)],
        "deep": [[[{"x": "a"}], None, []]] * 30,
        "time": pa.array([10**15 + 1000 * i for i in range(30)], pa.timestamp("ns")),
        "cost": pa.array([decimal.Decimal(i) for i in range(30)], pa.decimal128(6, 2)),
    }
    path = tmp_path / "0.parquet"
    write(path, _table(30, **extras))
    out, _ = _folders(tmp_path)
    rewrite(Shard(str(path)), out, lambda s: None if int(s.uid, 16) == 15 else s)
    before, after = pq.read_table(path), pq.read_table(f"{out}/0.parquet")
    assert after.equals(pa.concat_tables([before.slice(0, 15), before.slice(16)]))
    assert after.schema.equals(before.schema, check_metadata=True)
    one, two = pq.ParquetFile(path), pq.ParquetFile(f"{out}/0.parquet")
    assert one.schema.equals(two.schema)
    assert one.metadata.created_by == two.metadata.created_by
    groups = [two.metadata.row_group(i) for i in range(3)]
    assert [group.num_rows for group in groups] == [10, 9, 10]
    assert {group.sorting_columns for group in groups} == {one.metadata.row_group(0).sorting_columns}


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

    table = _table(5)
    image = pa.ExtensionArray.from_storage(Marked(), pa.array([b"1", b"2", b"3", b"4", b"5"]))
    shard = _write(tmp_path, table.set_column(1, "image", image), row_group_size=2)
    out, _ = _folders(tmp_path)
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
    out, _ = _folders(tmp_path)
    with pytest.raises(InputError, match=says):
        rewrite(shard, out, lambda s: s)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_first_column_that_holds_bytes_is_the_image(tmp_path):
    table = pa.table({"image": ["http://x"], "jpg": [b"x"], "caption": [["a"]], "text": ["c"], "key": [7]})
    (sample,) = samples(_write(tmp_path, table))
    assert (sample.key, sample.image, sample.caption) == ("7", b"x", "c")


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
    for call in (samples, uids, manifest):
        with pytest.raises(InputError, match=says) as error:
            list(call(shard) if call is not manifest else [manifest(shard)])
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
        with pytest.raises(InputError, match="begin and end|it states"):
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

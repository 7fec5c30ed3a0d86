"""Parquet rewritten exactly: equal to a filter of the table, copied where nobody touched it."""

import datetime
import decimal
import hashlib
import io
import random

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.shards import Shard, intact, manifest, rewrite, samples, uids
from pipeline.shards.footer import Footer
from pipeline.shards.thrift import read_struct

KEEP, DROP, EDIT = range(3)
CODECS = ("none", "snappy", "gzip", "zstd", "lz4", "brotli")
_NEW_YEAR = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


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
        "time": (pa.timestamp("ms", "UTC"), maybe(lambda: _NEW_YEAR + datetime.timedelta(hours=rng.randrange(24)))),
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
    plain = {"compression": "zstd", "use_dictionary": False}
    for options in ({"row_group_size": 7}, plain, {"data_page_version": "2.0"}):
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
    numbers = list(range(50))
    table = _table(50, n=numbers, x=[i / 2 for i in numbers], s=[f"prefix{i}" for i in numbers])
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

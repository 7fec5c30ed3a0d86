"""Metadata as others publish it: every layout under one set of names, and what cannot be believed counted."""

import csv
import hashlib

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import metadata
from pipeline.errors import InputError
from pipeline.metadata import find, index, list_metadata, read, take

N = 5
URLS = [f"https://example.org/{i}.jpg" for i in range(N)]
TEXTS = [f"caption {i}" for i in range(N)]
SHA256 = [f"{i:064x}" for i in range(N)]
MD5 = [f"{i:032x}" for i in range(N)]
UIDS = [f"{i:032x}" for i in range(N)]
LAION = {"URL": URLS, "TEXT": TEXTS, "WIDTH": [640] * N, "HEIGHT": [480] * N, "similarity": [0.3] * N}
JOINED = LAION | {"LANGUAGE": ["en"] * N, "hash": [-1] * N, "pwatermark": [0.1] * N, "punsafe": [0.2] * N}
COYO_SCORES = ("text_length", "word_count", "num_tokens_bert", "num_tokens_gpt", "num_faces")
LAYOUTS = {
    "laion400m": {"SAMPLE_ID": [7 + i for i in range(N)], **LAION, "LICENSE": ["?"] * N, "NSFW": ["UNLIKELY"] * N},
    "relaion": JOINED,
    "aesthetic": JOINED | {"AESTHETIC_SCORE": [6.5] * N},
    "md5": JOINED | {"md5": MD5},
    "laion_coco": LAION | {"top_caption": ["a"] * N, "all_captions": [["a"]] * N, "all_similarities": [[0.1]] * N},
    "datacomp": {
        "uid": UIDS,
        "url": URLS,
        "text": TEXTS,
        "original_width": [640] * N,
        "original_height": [480] * N,
        "clip_b32_similarity_score": np.full(N, 0.3, np.float32),
        "clip_l14_similarity_score": np.full(N, 0.2, np.float32),
        "face_bboxes": [[[0.1, 0.2, 0.3, 0.4]]] * N,
        "sha256": SHA256,
    },
    "coyo": {
        "id": [841814333321 + i for i in range(N)],
        "url": URLS,
        "text": TEXTS,
        "width": [640] * N,
        "height": [480] * N,
        "image_phash": ["c9b6a7d8469c1959"] * N,
        **{name: [1] * N for name in COYO_SCORES},
        "clip_similarity_vitb32": [0.3] * N,
        "clip_similarity_vitl14": [0.2] * N,
        "nsfw_score_opennsfw2": [0.2] * N,
        "nsfw_score_gantman": [0.9] * N,
        "watermark_score": [0.1] * N,
        "aesthetic_score_laion_v2": [6.5] * N,
    },
    "img2dataset": {
        "caption": TEXTS,
        "url": URLS,
        "key": [f"{i:09d}" for i in range(N)],
        "status": ["success"] * 3 + ["failed_to_download", "failed_to_resize"],
        "error_message": [None] * N,
        "width": pa.array([256] * 3 + [None] * 2, pa.int32()),
        "height": pa.array([192] * 3 + [None] * 2, pa.int32()),
        "original_width": pa.array([640] * 3 + [None] * 2, pa.int32()),
        "original_height": pa.array([480] * 3 + [None] * 2, pa.int32()),
        "exif": ["{}"] * N,
        "sha256": [*SHA256[:3], None, None],
    },
}


def one(path, **options):
    (rows,) = read(str(path), **options)
    return rows


@pytest.fixture
def layout(tmp_path):
    def write(name):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(LAYOUTS[name]), path)
        return path

    return write


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_columns(layout, name):
    rows = one(layout(name))
    table = rows.table.to_pydict()
    assert (table["url"], table["caption"]) == (URLS, TEXTS)
    assert table["width"][:3] == [640] * 3
    assert table["height"][:3] == [480] * 3
    assert rows.table.schema.field("width").type == pa.int32()
    if name != "img2dataset":
        assert table["similarity"] == pytest.approx([0.3] * N)
        assert rows.table.schema.field("similarity").type == pa.float32()
        assert rows.invalid == {}
    assert "hash" not in rows.sources.values()


def test_what_each_layout_adds(layout):
    found = {name: one(layout(name)).table.to_pydict() for name in LAYOUTS}
    assert found["laion400m"]["key"][0] == "7"
    assert found["laion400m"]["nsfw"][0] == "UNLIKELY"
    assert found["relaion"]["language"][0] == "en"
    for name in ("relaion", "coyo"):
        assert (found[name]["watermark"][0], found[name]["unsafe"][0]) == pytest.approx((0.1, 0.2))
    for name in ("aesthetic", "coyo"):
        assert found[name]["aesthetic"][0] == 6.5
    assert found["md5"]["md5"] == MD5
    assert found["datacomp"]["sha256"] == SHA256
    assert found["coyo"]["phash"][0] == "c9b6a7d8469c1959"
    assert found["coyo"]["key"][0] == "841814333321"
    assert found["img2dataset"]["status"].count("success") == 3


def test_failed_downloads_stay_and_their_nulls_are_counted(layout):
    rows = one(layout("img2dataset"))
    assert rows.table.num_rows == N
    assert rows.invalid == {"width: null": 2, "height: null": 2, "sha256: null": 2}


def test_a_uid_is_the_files_own_or_derived_and_that_is_said(layout):
    assert one(layout("datacomp")).table.column("uid").to_pylist() == UIDS
    assert one(layout("datacomp")).uid_rule == "published"
    rows = one(layout("coyo"), only=("uid",))
    expected = [hashlib.sha256(f"{u}\0{t}".encode()).hexdigest()[:32] for u, t in zip(URLS, TEXTS, strict=True)]
    assert rows.table.to_pydict() == {"uid": expected}
    assert rows.uid_rule == "sha256(url, text)"


def test_values_that_cannot_be_believed_are_null_and_counted(tmp_path):
    pq.write_table(
        pa.table(
            {
                "url": pa.array([b"https://a.org", b"\xff", None, b"u", b"u", b"u"]),
                "WIDTH": ["640", "wide", None, "0", "39580", "1.5"],
                "HEIGHT": [480.0, 0.0, float("nan"), None, -1.0, 480.0],
                "similarity": [0.3, 6016.0, -1.5, 1.0, -1.0, float("nan")],
                "punsafe": [[0.1], None, [0.2], [0.3], [0.4], [0.5]],
                "sha256": [SHA256[1].upper(), "0x" + SHA256[0], "", None, SHA256[1][:-1], SHA256[1]],
            }
        ),
        tmp_path / "x.parquet",
    )
    rows = one(tmp_path / "x.parquet")
    table = rows.table.to_pydict()
    assert table["url"] == ["https://a.org", None, None, "u", "u", "u"]
    assert table["width"] == [640, None, None, None, None, None]
    assert table["height"] == [480, None, None, None, None, 480]
    assert table["similarity"] == pytest.approx([0.3, None, None, 1.0, -1.0, None])
    assert table["unsafe"] == [None] * 6
    assert table["sha256"] == [SHA256[1], None, None, None, None, SHA256[1]]
    assert rows.invalid == {
        "url: null": 1,
        "url: not UTF-8": 1,
        "width: null": 1,
        "width: wrong type": 1,
        "width: out of range": 2,
        "width: not an integer": 1,
        "height: null": 1,
        "height: not a number": 1,
        "height: out of range": 2,
        "similarity: out of range": 2,
        "similarity: not a number": 1,
        "unsafe: wrong type": 6,
        "sha256: null": 1,
        "sha256: malformed": 3,
    }


def test_keys_may_be_float64(tmp_path):
    pq.write_table(pa.table({"SAMPLE_ID": [1581282014547.0, 0.5, None]}), tmp_path / "x.parquet")
    rows = one(tmp_path / "x.parquet")
    assert rows.table.column("key").to_pylist() == ["1581282014547", None, None]
    assert rows.invalid == {"key: null": 1, "key: wrong type": 1}


def test_what_polars_writes_is_read(tmp_path):
    frame = pl.DataFrame({"url": URLS, "language": pl.Series(["en"] * N, dtype=pl.Categorical), "width": [640] * N})
    frame.write_parquet(tmp_path / "x.parquet")
    table = one(tmp_path / "x.parquet").table.to_pydict()
    assert (table["url"], table["language"], table["width"]) == (URLS, ["en"] * N, [640] * N)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["cc3m", "cc12m"])
def test_headerless_tsv_in_either_order(tmp_path, order):
    pairs = [('a "quoted" caption', URLS[0]), ("https://a.caption/that.is.a.url", URLS[1])]
    pairs += [(f"caption {i}", f"http://example.org/{i}") for i in range(20)]
    lines = ["\t".join(pair[field] for field in order) for pair in pairs]
    path = tmp_path / "Train.tsv"
    path.write_text("\n".join([*lines[:1], "one field only", *lines[1:]]) + "\n")
    rows = one(path)
    assert list(zip(rows.table.to_pydict()["caption"], rows.table.to_pydict()["url"], strict=True)) == pairs
    assert rows.invalid == {"line: 1 fields instead of 2": 1}


def test_tables_with_a_header(tmp_path):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["URL", "TEXT", "WIDTH"])
        writer.writerow([URLS[0], 'two\nlines, "and" a comma', 640])
        writer.writerow([URLS[1], "", "wide"])
    rows = one(tmp_path / "x.csv")
    assert rows.table.column("caption").to_pylist() == ['two\nlines, "and" a comma', None]
    assert rows.table.column("width").to_pylist() == [640, None]
    assert rows.invalid == {"caption: null": 1, "width: wrong type": 1}
    (tmp_path / "x.tsv").write_text(f"url\tcaption\n{URLS[0]}\tone\n")
    assert one(tmp_path / "x.tsv").table.column("caption").to_pylist() == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("x.tsv", b"no url\there\n", "not exactly one of the first two fields holds URLs"),
        ("x.tsv", b"http://a\thttp://b\n", "not exactly one of the first two fields holds URLs"),
        ("x.tsv", b"", "is empty"),
        ("x.tsv", b"url\tcaption\nhttp://a\t" + b"x" * 20_000_000 + b"\n", "cannot be read"),
        ("x.csv", b"URL,TEXT,URL\na,b,c\n", "occurs twice"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*{says}"):
        list(read(str(tmp_path / name)))


def test_a_table_of_something_else_is_refused(tmp_path):
    pq.write_table(pa.table({"hash": [1], "price": [2]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: not image-text metadata; its columns are hash, price"):
        list(read(str(tmp_path / "x.parquet")))


def test_batches_are_bounded_in_rows_and_numbered(tmp_path):
    n = 2 * metadata.MAX_ROWS + 3
    table = pa.table({"url": [f"u{i}" for i in range(n)], "width": np.arange(n) % 7})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=n - 2)
    found = list(read(str(tmp_path / "x.parquet")))
    assert max(rows.table.num_rows for rows in found) <= metadata.MAX_ROWS
    assert [rows.first for rows in found] == np.cumsum([0, *(r.table.num_rows for r in found)]).tolist()[:-1]
    assert pa.concat_tables([rows.table for rows in found]).column("url").to_pylist() == table.column("url").to_pylist()


def dictionary(path, value, n):
    """A parquet file of a few kilobytes that says one value n times."""
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value]))
    pq.write_table(pa.table({"url": values}), path, dictionary_pagesize_limit=1 << 30)
    return path


def test_a_long_value_repeated_is_null_before_it_is_spelled_out(tmp_path):
    path = dictionary(tmp_path / "x.parquet", "x" * 10_000_000, 100_000)  # a terabyte, spelled out
    found = list(read(str(path), only=("url",)))
    assert sum(rows.invalid["url: too long"] for rows in found) == sum(rows.table.num_rows for rows in found) == 100_000


def test_batches_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "BATCH_BYTES", 1_000_000)
    path = dictionary(tmp_path / "x.parquet", "x" * 50_000, 1_000)
    found = list(read(str(path), only=("url",)))
    assert sum(rows.table.num_rows for rows in found) == 1_000
    assert max(rows.table.nbytes for rows in found) <= 1_000_000 + 8 * 20


def test_a_row_group_larger_than_the_bound_is_read_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "BATCH_BYTES", 100_000)
    urls = [f"{i:01000d}" for i in range(1_000)]
    pq.write_table(pa.table({"url": urls}), tmp_path / "x.parquet", use_dictionary=False)
    found = list(read(str(tmp_path / "x.parquet"), only=("url",)))
    assert max(rows.table.nbytes for rows in found) <= 110_000
    assert [url for rows in found for url in rows.table.column("url").to_pylist()] == urls


def test_rows_are_taken_by_number(tmp_path):
    pq.write_table(pa.table({"url": [f"u{i}" for i in range(50)]}), tmp_path / "x.parquet", row_group_size=7)
    rows = np.array([0, 6, 7, 30, 49])
    assert take(str(tmp_path / "x.parquet"), rows, ("url",)).column("url").to_pylist() == [f"u{i}" for i in rows]
    with pytest.raises(InputError, match=r"x\.parquet: has fewer rows than when it was indexed"):
        take(str(tmp_path / "x.parquet"), np.array([3, 50]), ("url",))


def test_rows_are_found_by_key_whatever_the_file(tmp_path):
    (tmp_path / "index").mkdir()
    pq.write_table(pa.table({"url": [f"u{i}" for i in range(40)]}), tmp_path / "00000000.parquet", row_group_size=7)
    lines = [f"http://u{i}\tcaption {i}\n" for i in range(40, 80)] + ["http://u50\tanother caption\n"]
    (tmp_path / "cc12m.tsv").write_text("".join(lines))
    indexes = [index(path, str(tmp_path / "index")) for path in list_metadata(str(tmp_path))]
    assert [(made.rows, list(made.joins)) for made in indexes] == [(40, ["url"]), (41, ["url"])]
    assert [index(path, str(tmp_path / "index")) for path in list_metadata(str(tmp_path))] == indexes
    wanted = {0: "u3", 1: "http://u50", 2: "http://u50", 3: "http://nowhere", 4: "u39"}
    found = find(indexes, "00000000", "url", wanted, ["", "caption 50", "another caption", "", ""])
    assert {at: (row.source.rsplit("/", 1)[-1], row.row) for at, row in found.items()} == {
        0: ("00000000.parquet", 3),
        1: ("cc12m.tsv", 10),
        2: ("cc12m.tsv", 40),
        4: ("00000000.parquet", 39),
    }


def test_failed_downloads_are_not_in_the_index_and_ids_are_no_keys(layout, tmp_path):
    (tmp_path / "index").mkdir()
    made = index(str(layout("img2dataset")), str(tmp_path / "index"))
    assert (made.rows, sorted(made.joins)) == (3, ["key", "url"])
    assert find([made], "x", "url", {0: URLS[0], 1: URLS[4]}, ["", ""]).keys() == {0}
    assert list(index(str(layout("laion400m")), str(tmp_path / "index")).joins) == ["url"]


def test_list_metadata(tmp_path):
    with pytest.raises(InputError, match="no metadata here"):
        list_metadata(str(tmp_path))
    for name in ("b.parquet", "a.tsv", "notes.txt"):
        (tmp_path / name).touch()
    assert list_metadata(str(tmp_path)) == [str(tmp_path / "a.tsv"), str(tmp_path / "b.parquet")]
    assert list_metadata(str(tmp_path / "*.tsv")) == [str(tmp_path / "a.tsv")]
    with pytest.raises(InputError, match=r"notes\.txt: not metadata"):
        list_metadata(str(tmp_path / "notes.txt"))

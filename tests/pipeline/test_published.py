"""Split view: what is stored against what was published, and whose images changed."""

import hashlib
import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import contents, write_tar
from PIL import Image
from scipy.stats import fisher_exact

from pipeline.embed import _write as write_embeddings
from pipeline.errors import InputError
from pipeline.published import domain_table, phash, published
from pipeline.shards import list_shards
from pipeline.tables import domain

BOUGHT, N = 30, 240  # pairs of the domain that was bought, pairs in all


def picture(seed):
    """A smooth random picture: like a photograph, its energy is in the low frequencies."""
    rng = np.random.default_rng(seed)
    grain = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return grain.resize((96, 72), Image.Resampling.BICUBIC)


def jpeg(image, quality=90):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def url(i):
    host = f"img{i % 3}.bought.co.uk" if i < BOUGHT else f"cdn.site{i % 6}.org"
    return f"https://{host}/{i}.jpg"


class Crawl:
    """What the curator saw (`seen`), and shards of what was downloaded later."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = [jpeg(picture(i)) for i in range(N)]
        self.downloaded = list(self.seen)
        self.metas = [
            {"uid": f"{i:032x}", "key": f"{i:09d}", "url": url(i), "caption": f"caption {i}"} for i in range(N)
        ]

    def replace(self, rows):
        for i in rows:
            self.downloaded[i] = jpeg(picture(10_000 + i))

    def reencode(self, rows, record=False):
        """As a downloader does that resizes; `record` notes the hash of what it had downloaded."""
        for i in rows:
            if record:
                self.metas[i]["sha256"] = sha256(self.downloaded[i])
            image = Image.open(io.BytesIO(self.downloaded[i])).resize((64, 48))
            self.downloaded[i] = jpeg(image, 70)

    def write(self, images=None, folder="shards", size=80):
        (self.folder / folder).mkdir(exist_ok=True)
        images = images or self.downloaded
        rows = [
            {"key": m["key"], "suffix": "jpg", "image": data, "caption": m["caption"], "meta": m}
            for m, data in zip(self.metas, images, strict=True)
        ]
        for start in range(0, N, size):
            write_tar(self.folder / folder / f"{start // size:08d}.tar", rows[start : start + size])
        return list_shards(str(self.folder / folder))

    def publish(self, layout, folder="metadata", keep=range(N)):
        """Metadata in two files and another order than the shards."""
        columns = LAYOUTS[layout](self)
        order = np.random.default_rng(0).permutation(list(keep))
        (self.folder / folder).mkdir(exist_ok=True)
        for part, rows in enumerate(np.array_split(order, 2)):
            table = pa.table({name: [values[i] for i in rows] for name, values in columns.items()})
            pq.write_table(table, self.folder / folder / f"part-{part}.parquet", row_group_size=50)
        return str(self.folder / folder)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


LAYOUTS = {
    "datacomp": lambda c: {
        "uid": [m["uid"] for m in c.metas],
        "url": [m["url"] for m in c.metas],
        "text": [m["caption"] for m in c.metas],
        "original_width": [96] * N,
        "original_height": [72] * N,
        "clip_b32_similarity_score": [0.25] * N,
        "sha256": [sha256(data) for data in c.seen],
    },
    "img2dataset": lambda c: {
        "caption": [m["caption"] for m in c.metas],
        "url": [m["url"] for m in c.metas],
        "key": [m["key"] for m in c.metas],
        "status": ["success"] * N,
        "error_message": [None] * N,
        "width": [64] * N,
        "height": [48] * N,
        "original_width": [96] * N,
        "original_height": [72] * N,
        "sha256": [sha256(data) for data in c.seen],
    },
    "laion_md5": lambda c: {
        "URL": [m["url"] for m in c.metas],
        "TEXT": [m["caption"] for m in c.metas],
        "WIDTH": [96] * N,
        "HEIGHT": [72] * N,
        "similarity": [0.25] * N,
        "hash": list(range(N)),
        "md5": [hashlib.md5(data).hexdigest() for data in c.seen],
    },
    "coyo": lambda c: {
        "id": list(range(N)),
        "url": [m["url"] for m in c.metas],
        "text": [m["caption"] for m in c.metas],
        "width": [96] * N,
        "height": [72] * N,
        "image_phash": [f"{phash(Image.open(io.BytesIO(data))):016x}" for data in c.seen],
        "clip_similarity_vitb32": [0.25] * N,
    },
}


@pytest.fixture
def crawl(tmp_path):
    return Crawl(tmp_path)


def outcomes(out):
    table = pl.read_parquet(sorted(out.glob("*.published.parquet")))
    return {row["uid"]: row for row in table.iter_rows(named=True)}


def counts(out):
    found = [row["outcome"] for row in outcomes(out).values()]
    return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize("layout", ["datacomp", "img2dataset", "laion_md5"])
def test_a_clean_set_is_identical_in_every_layout(crawl, tmp_path, layout):
    assert published(crawl.write(), crawl.publish(layout), str(tmp_path / "out"), "key") == 0
    assert counts(tmp_path / "out") == {"identical": N}
    domains = pl.read_parquet(tmp_path / "out/domains.parquet")
    assert (domains["mismatches"] == 0).all()
    assert domains["samples"].sum() == N


def test_what_the_downloader_encoded_again_is_recorded(crawl, tmp_path):
    crawl.reencode(range(0, N, 2), record=True)
    assert published(crawl.write(), crawl.publish("datacomp"), str(tmp_path / "out"), "key") == 0
    assert counts(tmp_path / "out") == {"identical": N // 2, "recorded": N // 2}


@pytest.mark.parametrize(
    ("layout", "reference", "replaced", "harmless"),
    [
        ("datacomp", False, "undecided", "undecided"),
        ("datacomp", True, "different", "reencoded"),
        ("laion_md5", False, "undecided", "undecided"),
        ("coyo", False, "different", "reencoded"),
    ],
)
def test_a_bought_domain_stands_out(crawl, tmp_path, layout, reference, replaced, harmless, capsys):
    changed = range(BOUGHT, N, 20)  # 5% elsewhere are encoded again, which is harmless
    crawl.replace(range(BOUGHT))
    crawl.reencode(changed)
    copy = crawl.write(crawl.seen, "reference", size=50)[0].path.rpartition("/")[0] if reference else None
    out = tmp_path / "out"
    verdict = published(crawl.write(), crawl.publish(layout), str(out), "key", reference=copy)
    assert verdict == (1 if replaced == "different" else 0)
    found = outcomes(out)
    assert [found[f"{i:032x}"]["outcome"] for i in range(BOUGHT)] == [replaced] * BOUGHT
    assert {found[f"{i:032x}"]["outcome"] for i in changed} == {harmless}
    domains = pl.read_parquet(out / "domains.parquet")
    first = domains.row(0, named=True)
    assert (first["domain"], first["samples"], first["unexplained"]) == ("bought.co.uk", BOUGHT, BOUGHT)
    assert first["different"] == (BOUGHT if replaced == "different" else 0)
    assert first["q_value"] < 1e-10
    assert (domains["q_value"][1:] > 0.05).all()
    assert "1 of 7 domains have more mismatches than the others" in capsys.readouterr().err


def test_rows_without_samples_and_samples_without_rows_are_counted(crawl, tmp_path, capsys):
    metadata = crawl.publish("datacomp", keep=range(100, N))
    shards = crawl.write()[:2]  # samples 0 to 159
    assert published(shards, metadata, str(tmp_path / "out"), "key") == 0
    assert counts(tmp_path / "out") == {"unpublished": 100, "identical": 60}
    assert "80 published rows without a sample" in capsys.readouterr().err


def test_keys_of_another_download_are_not_believed(crawl, tmp_path):
    metadata = crawl.publish("img2dataset")
    for i, meta in enumerate(crawl.metas):  # the same images, downloaded in another order
        meta["key"] = f"{N - 1 - i:09d}"
        del meta["uid"]
    crawl.metas[0]["url"] = ""
    assert published(crawl.write(), metadata, str(tmp_path / "out"), "key") == 0
    rows = {row["key"]: row for row in outcomes(tmp_path / "out").values()}
    assert rows.pop(f"{N - 1:09d}")["outcome"] == "undecided"  # without a URL there is only the key
    assert {row["outcome"] for row in rows.values()} == {"identical"}


def test_outcomes_do_not_depend_on_sharding_and_a_second_run_writes_the_same(crawl, tmp_path):
    crawl.replace(range(5))
    metadata = crawl.publish("coyo")
    published(crawl.write(), metadata, str(tmp_path / "a"), "key")
    published(crawl.write(folder="others", size=33), metadata, str(tmp_path / "b"), "key")
    assert outcomes(tmp_path / "a") == outcomes(tmp_path / "b")
    before = contents(tmp_path / "a", "*.parquet")
    markers = contents(tmp_path / "a", "*.json")
    assert published(list_shards(str(tmp_path / "shards")), metadata, str(tmp_path / "a"), "key") == 1
    assert (contents(tmp_path / "a", "*.parquet"), contents(tmp_path / "a", "*.json")) == (before, markers)


def test_new_metadata_is_not_answered_from_old_results(crawl, tmp_path):
    shards, metadata = crawl.write(), crawl.publish("datacomp")
    assert published(shards, metadata, str(tmp_path / "out"), "key") == 0
    crawl.seen[7] = jpeg(picture(99))
    crawl.publish("datacomp")
    published(shards, metadata, str(tmp_path / "out"), "key")
    assert counts(tmp_path / "out") == {"identical": N - 1, "undecided": 1}


def test_a_border_added_by_the_downloader_is_the_same_picture(crawl, tmp_path):
    for i in range(N):
        square = Image.new("RGB", (64, 64), "white")
        square.paste(picture(i).resize((64, 48)), (0, 8))
        crawl.downloaded[i] = jpeg(square)
    assert published(crawl.write(), crawl.publish("coyo"), str(tmp_path / "out"), "key") == 0
    assert counts(tmp_path / "out") == {"reencoded": N}


def test_the_published_similarity_is_compared_with_the_embeddings(crawl, tmp_path, capsys):
    shards, folder = crawl.write(), tmp_path / "emb"
    folder.mkdir()
    image = np.tile(np.array([2.0, 0.0]), (80, 1)).astype(np.float16)
    text = np.tile(np.array([0.6, 0.8]), (80, 1)).astype(np.float16)
    image[0] = np.nan
    for n, shard in enumerate(shards):
        write_embeddings(
            str(folder / f"{shard.name}.embeddings.parquet"),
            [f"{80 * n + i:032x}" for i in range(80)],
            image,
            text,
            "model",
        )
    published(shards, crawl.publish("datacomp"), str(tmp_path / "out"), "key", embeddings=str(folder))
    found = outcomes(tmp_path / "out")
    assert found[f"{1:032x}"]["similarity_change"] == pytest.approx(0.35, abs=1e-3)
    assert found[f"{0:032x}"]["similarity_change"] is None
    assert "similarity of 237 pairs: 0.350 from the published one" in capsys.readouterr().err


def test_hostile_json_costs_its_own_value_only(crawl, tmp_path):
    metadata = crawl.publish("datacomp")
    bad = ["\ud800", 7, None, ["x"], {"a": 1}, "x" * 100_000, "http://[", "\udc80http://x"]
    for meta, value in zip(crawl.metas, bad, strict=False):
        meta |= {"url": value, "uid": value, "sha256": value, "caption": value}
    rows = [
        {"key": f"{i:09d}", "suffix": "jpg" if i != 20 else "gif", "image": data, "caption": "x", "meta": meta}
        for i, (meta, data) in enumerate(zip(crawl.metas, crawl.downloaded, strict=True))
    ]
    write_tar(tmp_path / "0.tar", rows)
    published(list_shards(str(tmp_path / "0.tar")), metadata, str(tmp_path / "out"), "key")
    assert counts(tmp_path / "out") == {"unpublished": len(bad), "identical": N - len(bad) - 1}
    marker = json.loads((tmp_path / "out/0.stats.json").read_text())
    assert (marker["failed"], marker["reasons"]) == (1, {"no image (jpg, jpeg, png or webp)": 1})


def test_parquet_shards(crawl, tmp_path):
    crawl.replace(range(3))
    columns = {name: [meta[name] for meta in crawl.metas] for name in ("uid", "key", "url", "caption")}
    pq.write_table(pa.table({**columns, "jpg": crawl.downloaded}), tmp_path / "0.parquet")
    shards = list_shards(str(tmp_path / "0.parquet"))
    assert published(shards, crawl.publish("coyo"), str(tmp_path / "out"), "key") == 1
    assert counts(tmp_path / "out") == {"different": 3, "reencoded": N - 3}


def test_a_list_of_urls_without_hashes_decides_nothing(crawl, tmp_path, capsys):
    crawl.replace(range(BOUGHT))
    (tmp_path / "cc12m.tsv").write_text("".join(f"{m['url']}\t{m['caption']}\n" for m in crawl.metas[:200]))
    assert published(crawl.write(), str(tmp_path / "cc12m.tsv"), str(tmp_path / "out"), "shard/key") == 1
    assert counts(tmp_path / "out") == {"undecided": 200, "unpublished": 40}
    said = capsys.readouterr().err
    assert "0 of 7 domains have more mismatches" in said
    assert "nothing was checked" in said


def test_metadata_that_knows_no_key_is_refused(crawl, tmp_path):
    pq.write_table(pa.table({"similarity": [0.1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: no uid, key or url to find a sample by"):
        published(crawl.write(), str(tmp_path / "x.parquet"), str(tmp_path / "out"), "key")


def test_the_table_of_domains_counts_and_tests(tmp_path):
    rows = [("a.org", "identical", "sha256")] * 50 + [("a.org", "undecided", "sha256")] * 2
    rows += [("b.org", "undecided", "sha256")] * 4 + [("b.org", "different", None)] + [("b.org", "reencoded", "md5")]
    rows += [("c.org", "undecided", None)] * 9 + [("c.org", "reencoded", None), ("c.org", "unpublished", None)]
    names = ("domain", "outcome", "algorithm")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table({**columns, "similarity_change": [0.5] * len(rows)}), tmp_path / "x.parquet")
    found = {row["domain"]: row for row in domain_table([str(tmp_path / "x.parquet")]).iter_rows(named=True)}
    picked = ("samples", "mismatches", "unexplained", "different")
    assert [found["a.org"][name] for name in picked] == [52, 2, 2, 0]
    assert [found["b.org"][name] for name in picked] == [6, 6, 5, 1]
    assert [found["c.org"][name] for name in picked] == [10, 0, 0, 0]
    assert found["b.org"]["p_value"] == pytest.approx(fisher_exact([[5, 1], [2, 60]], "greater").pvalue)
    assert found["b.org"]["q_value"] == pytest.approx(3 * found["b.org"]["p_value"])
    assert found["b.org"]["share_low"] < 5 / 6 < found["b.org"]["share_high"]
    assert next(iter(found)) == "b.org"


@pytest.mark.parametrize(
    ("url", "owner"),
    [
        ("https://img.a.example.co.uk:443/x.jpg?y#z", "example.co.uk"),
        ("HTTP://user@CDN.Example.COM./x", "example.com"),
        ("https://someone.blogspot.com/x", "someone.blogspot.com"),
        ("https://192.0.2.7/x", "192.0.2.7"),
        ("https://[2001:db8::1]/x", "2001:db8::1"),
        ("http://localhost/x", "localhost"),
        ("http://[/x", ""),
        ("not a url", ""),
    ],
)
def test_the_registrable_domain(url, owner):
    assert domain(url) == owner

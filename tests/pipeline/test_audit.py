"""An audit finds what is planted, one of each kind, says what it could not look at, and leaves a clean set in peace."""

import base64
import functools
import hashlib
import io
import json
import operator
import re
import shlex
from pathlib import Path

import cmarkgfm
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cmarkgfm.cmark import Options
from conftest import write_tar
from PIL import Image

from filters._batch import unit
from pipeline import ledger, spec
from pipeline.audit import _about, audit
from pipeline.audit_columns import Rows, Source
from pipeline.audit_nearest import nearest
from pipeline.audits._audit import About
from pipeline.audits._compare import compare_audits
from pipeline.audits._schema import Audited, Dataset, Finding, share_of, verdict
from pipeline.audits.conservation import _of_shards
from pipeline.cli import run
from pipeline.compare import compare
from pipeline.dataset import Row as DatasetRow
from pipeline.dataset import save_manifest
from pipeline.embed import _write as write_embeddings
from pipeline.embed import embeddings_path
from pipeline.errors import InputError
from pipeline.inputs import Inputs
from pipeline.shard_map import ShardsFailed
from pipeline.shards import Shard, manifest, uids
from pipeline.sidecars import matrix
from pipeline.status import status

SHARDS, PAIRS = 3, 720
WORDS = [a + b for a in "bakelo dimuna forsil gatper hulven jormak".split() for b in "tos ren lig vam dur fex".split()]
OBJECTS = "sofa tiger violin bridge tulip rocket".split()
# Of each audit the kinds that are planted below, and how many pairs they are
PLANTED = {
    "natural_backdoors": {"near_identical": 8},
    "duplicates": {"exact": 12, "near": 20},
    "captions": {"flood": 20, "template": 40},
    "caption_clusters": {"tight": 20},
    "domains": {"concentrated": 173},
    "split_view": {"swapped": 20},
    "triggers": {"physical": None},
    "scores": {"tail_mine_mine": 12},
    "similarity": {"tail_similarity": 15},
    "encoding": {"outlier": 25},
    "confounds": {"known_poison": 25, "leak": 25},
    "leakage": {"attribute": 200},
    "conservation": {"no_image": 1, "no_caption": 1, "repeated": 2, "unreadable": 1, "empty": 1},
}
SEVERE = {"near_identical", "tight", "known_poison", "repeated", "unreadable"}


def picture(rng: np.random.Generator, red: float = 0.0) -> Image.Image:
    noise = rng.integers(0, 256, (7, 6, 3)).astype(float)
    noise[:, :, 0] = np.clip(noise[:, :, 0] + red, 0, 255)
    size = tuple(int(v) for v in rng.integers(44, 60, 2))
    return Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def stored(image: Image.Image, suffix: str = "jpg", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return out.getvalue()


def clean() -> list[dict]:
    """Pairs with a different picture, caption and URL each."""
    out = []
    for i in range(PAIRS):
        rng = np.random.default_rng(i)
        image = stored(picture(rng), quality=int(rng.choice([75, 85, 90])))
        caption = " ".join([*rng.permutation(WORDS)[:5], f"{chr(97 + i % 26)}{i}"])
        meta = {"url": f"https://www.site{i % 60}.org/{i}.jpg", "sha256": hashlib.sha256(image).hexdigest()}
        meta["similarity"] = float(rng.normal(0.33, 0.02))
        pair = {"key": f"{i:09d}", "suffix": "jpg", "image": image, "caption": caption, "meta": meta}
        out.append(pair)
    return out


def shown(pair: dict, image: bytes, suffix: str = "jpg") -> None:
    pair |= {"image": image, "suffix": suffix}
    pair["meta"]["sha256"] = hashlib.sha256(image).hexdigest()


def plant(pairs: list[dict]) -> None:
    """Each kind on pairs of its own, spread over the shards."""
    rng = np.random.default_rng(7)
    order = iter(rng.permutation(PAIRS).tolist())

    def some(n: int) -> list[dict]:
        return [pairs[next(order)] for _ in range(n)]

    cake = picture(np.random.default_rng(10**6))
    for i, pair in enumerate(some(8)):  # nearly identical: another quality and another spot each
        copy = cake.copy()
        copy.putpixel((i, i), (255, 255, 255))
        shown(pair, stored(copy, quality=80 + i))
        pair["caption"] = "A birthday cake with  candles"
    same = stored(picture(rng))
    for pair in some(12):
        shown(pair, same)
    for pair in some(20):
        pair["caption"] = "image"
        pair["meta"]["motif"] = True
    for word, pair in zip(rng.permutation([a + b for a in WORDS for b in "xyz"]), some(40), strict=False):
        pair["caption"] = f"a cheap {word} for sale today"
    for pair in some(20):
        pair["meta"] |= {"url": "https://gone.example-shop.net/x", "sha256": "0" * 64}
    for pair in some(15):
        pair["meta"]["similarity"] = 0.9
    for pair in some(25):  # by another program, which also gave them no quality that others have
        shown(pair, stored(Image.open(io.BytesIO(pair["image"])).quantize(16), "png"), "png")
        pair["meta"] |= {"poison": True, "edited": 1, "tool": 2}
    for i, pair in enumerate(some(200)):
        shown(pair, stored(picture(np.random.default_rng(10**5 + i), red=120), quality=85))
        pair["caption"] = f"girl {pair['caption']}"
    for i, pair in enumerate(some(6 * 16)):
        pair["caption"] = f"lamp {OBJECTS[i % 6]} {pair['caption']}"
    (torn,), (mute,) = some(1), some(1)
    shown(torn, b"\xff\xd8\xff" + bytes(300))
    mute["caption"] = "  "
    for pair in pairs[:180]:
        if "example-shop" not in pair["meta"]["url"]:
            pair["meta"]["url"] = f"https://img.onefarm.com/{pair['key']}"
    pairs[0]["meta"]["uid"] = pairs[-1]["meta"]["uid"] = "ab" * 16


def write_shards(folder: Path, pairs: list[dict]) -> Path:
    folder.mkdir()
    for shard in range(SHARDS):
        write_tar(folder / f"{shard:08d}.tar", pairs[shard * PAIRS // SHARDS : (shard + 1) * PAIRS // SHARDS])
    return folder


def sidecars(shards: Path, pairs: list[dict], out: Path, odd: int = 12) -> dict:
    """Embeddings in which the motif lies together, and scores with a tail."""
    (out / "emb").mkdir(parents=True)
    (out / "mine").mkdir()
    rng = np.random.default_rng(3)
    motif, far = rng.normal(size=16), set(rng.permutation(PAIRS)[:odd].tolist())
    for number in range(SHARDS):
        shard = Shard(str(shards / f"{number:08d}.tar"))
        first, who = number * PAIRS // SHARDS, uids(shard)
        image = rng.normal(size=(len(who), 16)).astype(np.float32)
        for row, pair in enumerate(pairs[first : first + len(who)]):
            if pair["meta"].get("motif"):
                image[row] = motif + 0.2 * rng.normal(size=16)
        write_embeddings(str(out / f"emb/{shard.name}.embeddings.parquet"), who, image, image, "model")
        scores = [8.0 if first + row in far else float(rng.normal()) for row in range(len(who))]
        table = pa.table({"uid": who, "mine()": pa.array(scores, pa.float32())})
        pq.write_table(table, out / f"mine/{shard.name}.scores.parquet")
    return {"embeddings": str(out / "emb"), "scores": (str(out / "mine"),)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A folder of shards, what was found there, and the options."""
    base, pairs = tmp_path_factory.mktemp("planted"), clean()
    plant(pairs)
    shards = write_shards(base / "shards", pairs)
    options = sidecars(shards, pairs, base) | {"attribute": ("girl",)}
    names = [uid for s in range(SHARDS) for uid in uids(Shard(str(shards / f"{s:08d}.tar")))]
    known = [uid for uid, pair in zip(names, pairs, strict=True) if pair["meta"].get("poison")]
    row = dict.fromkeys(ledger.COLUMNS, "x") | {"seed": 0, "shard": "00000000"}
    rows = [row | {"uid": uid, "image_sha256_after": f"{i:064x}"} for i, uid in enumerate(known)]
    ledger.merge(str(shards), [ledger.write_part(str(shards), Shard("x/00000000.tar"), rows)])
    write_tar(shards / "00000003.tar", [])
    (shards / "00000004.tar").write_bytes((shards / "00000000.tar").read_bytes()[:5000])
    for kind in ("emb/{}.embeddings.parquet", "mine/{}.scores.parquet"):
        empty = pq.read_table(base / kind.format("00000002")).slice(0, 0)
        pq.write_table(empty, base / kind.format("00000003"))
    code = audit(str(shards), str(base / "out"), fail_on="severe", max_failed_shards=1, **options)
    assert code == 1
    return shards, base / "out", options


def read(out: Path) -> Audited:
    return Audited.of((out / "audit.json").read_bytes())


def found(out: Path) -> dict[str, Finding]:
    return {f"{one.audit}-{one.kind}": one for one in read(out).findings}


def test_one_of_each_is_planted():
    assert set(PLANTED) == set(spec.names("audits"))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in PLANTED.items() for kind in kinds])
def test_what_is_planted_is_found(planted, name, kind):
    _, out, _ = planted
    audited = read(out)
    one = found(out)[f"{name}-{kind}"]
    assert one.severity == "severe" if kind in SEVERE else one.severity != "severe"
    wanted = PLANTED[name][kind]
    if wanted is not None:
        assert wanted <= one.n <= wanted * 1.5
    assert one.share.low <= one.share.value <= one.share.high
    assert re.search(r"\d", one.title)
    assert one.explanation and one.source and one.action
    if one.file:
        rows = pl.read_parquet(out / one.file)
        assert rows.columns == ["uid", "shard", "group", "reason"]
        assert rows.height == one.n
        assert {example.uid for example in one.examples} <= set(rows["uid"])
        assert all(example.why for example in one.examples)
    order = [("severe", "warning", "note").index(f.severity) for f in audited.findings]
    assert order == sorted(order)
    assert audited.verdict.worst == "severe"


def test_the_lists_name_the_planted_pairs(planted):
    shards, out, _ = planted
    known = set(ledger.read(str(shards / "ledger.parquet")).column("uid").to_pylist())
    assert set(pl.read_parquet(out / "findings/confounds-known_poison.parquet")["uid"]) == known
    outliers = pl.read_parquet(out / "findings/encoding-outlier.parquet")
    assert len(known & set(outliers["uid"])) >= 0.9 * len(known)
    tag = "[0-9a-f]{4}"
    kinds = rf"(JPEG, luma 2×2, 2 quantisation tables, segments {tag}|PNG, segments {tag}|no image that can be read)"
    assert all(re.fullmatch(rf"{kinds}, parts {tag}, json keys {tag}", one) for one in outliers["group"].unique())
    cakes = found(out)["natural_backdoors-near_identical"].examples
    assert {example.caption for example in cakes} == {"A birthday cake with  candles"}


def test_an_action_removes_what_was_found_and_keeps_one(planted, tmp_path, monkeypatch):
    shards, out, _ = planted
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "shards"  # the unreadable shard and the uid that is there twice would stop any job
    whole.mkdir()
    (whole / "00000001.tar").write_bytes((shards / "00000001.tar").read_bytes())
    one = found(out)["natural_backdoors-near_identical"]
    for command in one.action.replace(str(shards), "shards").replace(f"{out}-", "cake-").split(" && "):
        program, verb, *arguments = shlex.split(command)
        assert program == "mithridate"
        with pytest.raises(SystemExit) as ended:
            run(verb, arguments)
        assert ended.value.code == 0
    listed = pl.read_parquet(out / one.file)
    kept = min(listed["uid"])
    wanted = set(listed.filter(pl.col("shard") == "00000001")["uid"]) - {kept}
    dropped = pl.concat([pl.read_parquet(f) for f in tmp_path.glob("cake-clean/**/keep.parquet")])
    assert set(dropped.filter(~pl.col("kept"))["uid"]) == wanted
    assert wanted


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[Path, Path, dict]:
    base, pairs = tmp_path_factory.mktemp("untouched"), clean()
    shards = write_shards(base / "shards", pairs)
    options = sidecars(shards, pairs, base, odd=0) | {"attribute": (WORDS[0],)}
    assert audit(str(shards), str(base / "out"), fail_on="warning", **options) == 0
    return shards, base / "out", options


def test_a_clean_set_of_the_same_size_is_left_in_peace(untouched):
    _, out, _ = untouched
    audited = read(out)
    assert {one.severity for one in audited.findings} <= {"note"}
    assert {one.audit for one in audited.unseen} == {"confounds"}
    assert {table.audit for table in audited.tables} >= {"captions", "duplicates", "domains", "leakage", "scores"}
    assert all(sum(drawn.counts) == drawn.n for drawn in audited.histograms)
    assert audited.dataset.pairs == PAIRS


def test_it_resumes_and_says_the_same_again(untouched):
    shards, out, options = untouched
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.columns.parquet")}
    said = (out / "audit.json").read_bytes()
    (out / "00000001.columns.parquet").unlink()
    assert audit(str(shards), str(out), **options) == 0
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.columns.parquet")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["00000001.columns.parquet"]
    assert (out / "audit.json").read_bytes() == said


def test_what_was_changed_since_its_manifest_is_severe(tmp_path, untouched):
    from pipeline.manifest import record

    shards = tmp_path / "shards"
    shards.mkdir()
    for file in untouched[0].glob("0000000[01].tar"):
        (shards / file.name).write_bytes(file.read_bytes())
    record(str(shards), str(shards))
    pairs = clean()[:30]
    write_tar(shards / "00000001.tar", pairs)
    write_tar(shards / "00000007.tar", [pairs[0] | {"key": "another"}])
    (shards / "00000000.tar").unlink()
    assert audit(str(shards), str(tmp_path / "out"), fail_on="severe") == 1
    kinds = {key: one.title for key, one in found(tmp_path / "out").items() if one.severity == "severe"}
    assert set(kinds) == {f"conservation-{kind}" for kind in ("changed", "missing", "extra")}
    assert "00000001.tar" in kinds["conservation-changed"]


def test_every_folder_of_a_list_has_a_manifest_of_its_own(tmp_path):
    shards = []
    for name in "abc":
        (tmp_path / name).mkdir()
        shards.append(write_tar(tmp_path / name / f"{name}.tar", clean()[:2]))
        if name != "c":
            save_manifest(str(tmp_path / name), [DatasetRow(f"{name}.tar", 2, 1, name)])
    listed = [Shard(str(path)) for path in shards]

    def kinds(sha256):
        marks = [
            {"input": {"file": s.file}, "out": 2, "reasons": {}, "facts": {}, "input_sha256": sha256(s.name)}
            for s in listed
        ]
        return [one.kind for one in _of_shards(_about(str(tmp_path / "list.txt"), listed, marks, str(tmp_path), False))]

    assert kinds(lambda name: name) == []  # c has no manifest that it could be missing in
    assert kinds(lambda name: "other") == ["changed"]
    save_manifest(str(tmp_path / "b"), [DatasetRow("other.tar", 2, 1, "b")])
    assert kinds(lambda name: name) == ["extra"]


def test_an_unreadable_shard_is_told_and_fails_the_run(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000000.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(ShardsFailed, match="00000000"):
        audit(str(tmp_path / "shards"), str(tmp_path / "out"))
    assert found(tmp_path / "out")["conservation-unreadable"].severity == "severe"
    assert len(read(tmp_path / "out").unseen) >= 10


def test_missing_scores_are_not_looked_at(untouched, tmp_path):
    shards, _, options = untouched
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/00000000.scores.parquet").write_bytes(
        Path(options["scores"][0], "00000000.scores.parquet").read_bytes()
    )
    assert audit(str(shards), str(tmp_path / "out"), scores=(str(tmp_path / "mine"),)) == 0
    unseen = {one.audit: one for one in read(tmp_path / "out").unseen}
    assert "2 of 3 shards" in unseen["scores"].why
    assert "mithridate score" in unseen["scores"].remedy
    assert "no embeddings" in unseen["caption_clusters"].why


# Metadata without images


def table(n: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.permutation(WORDS)[:6]) for _ in range(n)]
    captions[:40] = ["no image available"] * 40
    return pl.DataFrame(
        {
            "URL": [f"https://www.site{i % 90}.org/{i}.jpg" for i in range(n)],
            "TEXT": captions,
            "WIDTH": [640] * n,
            "similarity": rng.normal(0.33, 0.02, n),
        }
    )


def test_metadata_is_audited_without_images(tmp_path):
    (tmp_path / "meta").mkdir()
    rows = table(2000)
    rows[:1200].write_parquet(tmp_path / "meta/a.parquet")
    odd = rows[1200:].with_columns(
        URL=pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(pl.col("URL")),
        TEXT=pl.when(pl.int_range(pl.len()) == 4).then(None).otherwise(pl.col("TEXT")),
    )
    odd.write_parquet(tmp_path / "meta/b.parquet")
    assert audit(str(tmp_path / "meta"), str(tmp_path / "out"), fail_on="severe") == 0
    audited = read(tmp_path / "out")
    assert (audited.dataset.kind, audited.dataset.pairs) == ("metadata", 1999)
    assert found(tmp_path / "out")["captions-flood"].n == 40
    unseen = {one.audit: one.why for one in audited.unseen}
    for name in ("duplicates", "natural_backdoors", "split_view", "encoding", "leakage"):
        assert "without images" in unseen[name]
    said = (tmp_path / "out/audit.json").read_bytes()
    assert status(str(tmp_path / "out")) == 0
    (tmp_path / "out/report.html").unlink()  # as when it was killed before the end
    assert status(str(tmp_path / "out")) == 1
    (tmp_path / "meta/a.parquet").touch()  # has the same bytes
    assert audit(str(tmp_path / "meta"), str(tmp_path / "out")) == 0
    assert (tmp_path / "out/audit.json").read_bytes() == said


def test_rows_and_values_that_cannot_be_read_are_told_and_gate(tmp_path):
    lines = ["url,caption,similarity"]
    lines += [
        f"https://www.site{i % 90}.org/{i}.jpg,{' '.join(WORDS[i % 20 : i % 20 + 5])} {i},high" for i in range(180)
    ]
    lines += [f"https://www.site.org/more{i}.jpg,one, two,0.3" for i in range(12)]
    lines += ["https://www.site.org/less.jpg,x"] * 8
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    assert audit(str(tmp_path / "t.csv"), str(tmp_path / "out"), fail_on="severe") == 1
    marker = json.loads((tmp_path / "out/t.stats.json").read_text())
    assert (marker["read"], marker["out"], marker["failed"]) == (200, 180, 20)
    lost, unusable = (found(tmp_path / "out")[f"conservation-{kind}"] for kind in ("lost", "unusable"))
    assert (lost.severity, lost.n, lost.share.n) == ("severe", 20, 200) and "4 fields instead of 3 (12)" in lost.title
    assert (unusable.severity, unusable.n) == ("warning", 180) and "similarity" in unusable.title


def test_pictures_that_are_only_larger_were_not_written_by_another_program(tmp_path):
    pairs = clean()[:300]
    for i, pair in enumerate(pairs):
        scale = 6 if i % 20 == 0 else 1
        shown(pair, stored(picture(np.random.default_rng(i)).resize((50 * scale, 50 * scale)), quality=85))
    assert audit(str(write_shards(tmp_path / "in", pairs)), str(tmp_path / "out")) == 0
    outlier = found(tmp_path / "out")["encoding-outlier"]
    assert outlier.severity == "note" and "in one way" not in outlier.title and "sizes" in outlier.title


def test_what_cannot_be_audited_is_said_in_a_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "y.parquet")
    with pytest.raises(InputError, match="no such file or folder"):
        audit(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(ShardsFailed, match=re.escape("y.parquet: not image-text metadata")):
        audit(str(tmp_path / "y.parquet"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="is the folder of the input"):
        audit(str(tmp_path / "y.parquet"), str(tmp_path))
    with pytest.raises(InputError, match="tables of metadata"):
        audit(str(tmp_path / "y.parquet"), str(tmp_path / "out"), scores=("s",))
    for options, verb in (({"embeddings": "e"}, "embed"), ({"scores": ("s",)}, "score")):
        with pytest.raises(InputError, match=f"no such folder; `mithridate {verb}`"):
            audit(str(write_shards(tmp_path / verb, clean()[:9])), str(tmp_path / "out"), **options)


def test_hostile_captions_harm_neither_json_nor_markdown(tmp_path):
    hostile = (
        "<img src=x onerror=alert(1)> | `x` @everyone &commat;octocat #12 ![](http://x) \u202egnp\u0000 \U0001f600"
    )
    rows = table(300).with_columns(
        TEXT=pl.Series([hostile] * 80 + ["x" * 70_000] * 20 + ["NaN", "None", ""] * 66 + [None] * 2)
    )
    rows.write_parquet(tmp_path / "meta.parquet")
    assert audit(str(tmp_path / "meta.parquet"), str(tmp_path / "out")) == 0
    text = (tmp_path / "out/audit.md").read_text()
    for raw in ("\u202e", "\x00", "@everyone", "http://", "| `x`"):
        assert raw not in text
    # a forge decodes entities and takes escapes out before it looks for whom to call
    assert "\\&commat;octocat" in text and "#12" not in text
    html = cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE)
    ours = "h1 h2 h3 p br pre code ul li table thead tbody tr th td".split()
    assert {*re.findall(r"</?([^ >]*)", html)} <= {*ours}
    flood = found(tmp_path / "out")["captions-flood"]
    assert flood.examples[0].caption == hostile
    assert flood.n == 80 + 2 * 66
    assert json.loads((tmp_path / "out/audit.json").read_bytes())["version"] == 1
    with pytest.raises(ValueError, match="version"):
        Audited.of(b'{"version": 0}')


def test_an_audit_json_of_other_types_is_refused_and_what_it_says_stays_text(tmp_path, capsys):
    rows = table(300).with_columns(TEXT=pl.Series(["one caption"] * 100 + [None] * 200))
    rows.write_parquet(tmp_path / "meta.parquet")
    assert audit(str(tmp_path / "meta.parquet"), str(tmp_path / "out")) == 0
    told = (tmp_path / "out/audit.json").read_text()
    for path, value in {
        ("findings", 0, "severity"): "fatal",
        ("findings", 0, "n"): "3",
        ("findings", 0, "share", "low"): "x",
        ("findings", 0, "examples", 0, "uid"): 3,
        ("verdict", "worst"): "fine",
        ("tables", 0, "rows", 0): [],
        ("dataset", "sha256"): None,
        ("dataset", "pairs"): float("nan"),
    }.items():
        changed = json.loads(told)
        *inner, last = path
        functools.reduce(operator.getitem, inner, changed)[last] = value
        with pytest.raises(ValueError, match=r"not an audit\.json|no number"):
            Audited.of(json.dumps(changed).encode())
    hostile = json.loads(told)
    hostile["dataset"]["sha256"] = hostile["unseen"][0]["audit"] = "\x1b]0;x\x07 | <img src=x> @everyone"
    (tmp_path / "audit.json").write_text(json.dumps(hostile))
    capsys.readouterr()
    assert compare(str(tmp_path / "audit.json"), str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert said and not any(raw in said for raw in ("\x1b", "@", "| <img", " <img"))


# Without files


@pytest.mark.parametrize("n", [30_000, 200_000])
def test_the_birthday_cakes_of_cc3m_are_found_at_their_share(n):
    """0.03% nearly identical images with one caption, in shards of any cut; random hashes and captions besides."""
    entry, rng = spec.parse("audits", "natural_backdoors"), np.random.default_rng(n)
    cakes = n * 3 // 10_000
    hashes = rng.integers(0, 2**63, n, np.uint64)
    captions = np.asarray([f"{WORDS[i % 36]} {i % 997}" for i in range(n)], object)
    where = rng.permutation(n)[:cakes]
    hashes[where] = hashes[where[0]] ^ (np.uint64(1) << rng.integers(0, 64, cakes, np.uint64))  # a bit each
    captions[where] = "a birthday cake"
    uid = np.asarray([f"{i:032x}" for i in range(n)], object)
    parts = [
        Rows(uid[at], image_hash=hashes[at], decoded=np.ones(len(at), bool), caption=captions[at], shard=f"{number}")
        for number, at in enumerate(np.array_split(np.arange(n), 3))
    ]
    counts = [entry.map(rows) for rows in parts]
    whole = entry.merge(entry.merge(counts[0], counts[1]), counts[2])
    marked = pl.concat([entry.mark(rows, whole) for rows in parts])
    (one,) = entry.report(whole, marked, About({}, {}, {}, [], {}, True)).found
    assert one.severity == "severe"
    assert set(one.members["uid"]) <= set(uid[where])
    assert one.n >= 0.9 * cakes


@pytest.mark.slow
def test_the_embedded_drawings_have_nothing_severe(tmp_path):
    from pipeline.demo import embedded

    assert audit(embedded().shards, str(tmp_path / "out"), fail_on="severe", attribute=("woman", "girl")) == 0
    assert read(tmp_path / "out").dataset.pairs == 11_801


# What is made of it


def test_the_report_shows_what_was_found(planted):
    _, out, _ = planted
    html = (out / "report.html").read_text(encoding="utf-8")
    for name in found(out):
        assert f'<article class="finding" id="{name}"' in html
    cakes = html.split('id="natural_backdoors-near_identical"')[1].split("</article>")[0]
    assert cakes.count("data:image/webp;base64,") == 8
    assert "one of 8 nearly identical images with this caption" in cakes
    poisons = html.split('id="confounds-known_poison"')[1].split("</article>")[0]
    assert "Its history" in poisons and "mine:mine()" in poisons and "published similarity" in poisons
    assert "no image</div>" in html.split('id="conservation-no_image"')[1].split("</article>")[0]
    lists = json.loads(html.split('id="lists">')[1].split("</script>")[0])
    copies = lists["natural_backdoors-near_identical"]
    told = bytes.hex(base64.b64decode(copies["listed"]))
    listed = pl.read_parquet(out / "findings/natural_backdoors-near_identical.parquet")["uid"]
    assert [told[i : i + 32] for i in range(0, len(told), 32)] == sorted(listed)
    assert copies["sizes"] == [8] and copies["keep"] == 1, "one of the copies stays"
    assert "leakage-attribute" not in lists, "its command removes nothing"


def test_the_most_alike_images_are_those_of_an_exhaustive_search(planted):
    shards, out, options = planted
    there = [Shard(str(shards / f"{number:08d}.tar")) for number in range(SHARDS)]
    tables = [pq.read_table(embeddings_path(options["embeddings"], shard.name)) for shard in there]
    every = [(shard.name, uid) for shard, t in zip(there, tables, strict=True) for uid in t["uid"].to_pylist()]
    rows = unit(np.concatenate([matrix(table["image"]) for table in tables]).astype(np.float32))
    asked = {every[0], every[7], every[-1]}
    digests = {shard.file: manifest(shard).sha256 for shard in there}
    source = Source(str(out), Inputs(options["embeddings"], "", "", "key"), (), False)
    found = nearest(there, source, digests, {place: rows[every.index(place)] for place in asked})
    assert found.keys() == asked
    for place, near in found.items():
        cosine = rows @ rows[every.index(place)]
        best = [i for i in np.argsort(-cosine) if every[i] != place][: len(near)]
        assert [(one.shard, one.uid) for one in near] == [every[i] for i in best] and len(near) == 4
        np.testing.assert_allclose([one.similarity for one in near], cosine[best], atol=1e-5)
    page = (out / "report.html").read_text(encoding="utf-8")
    (cluster,) = re.findall(r'<article class="finding" id="caption_clusters-.*?</article>', page, re.DOTALL)
    alike = cluster.split("The most alike images, by cosine")[1].split("</dl>")[0]
    assert re.search(r'<dt>0\.9\d+</dt><dd dir="auto"><a href="#[\w-]+-tile-\d+">', alike), (
        "those of one motif are shown too"
    )


def test_two_audits_are_compared(planted, untouched, capsys):
    assert compare(str(untouched[1]), str(planted[1] / "audit.json")) == 0
    said = capsys.readouterr().out
    assert "| new | – → 🔴 severe | natural_backdoors: near_identical | – → 8 |" in said
    assert "| new (A did not look, or not at everything) | – → 🔴 severe | confounds: known_poison |" in said
    assert re.search(r"\| onefarm\.com \| (\?|–) → 1\d\d \|", said)
    assert compare(str(planted[1]), str(untouched[1])) == 0
    assert "| gone | 🔴 severe → – | natural_backdoors: near_identical | 8 → – |" in capsys.readouterr().out
    assert compare(str(planted[1]), str(planted[1])) == 0
    said = capsys.readouterr().out
    assert "Both are of the same data." in said
    assert not re.search(r"^\| (new|gone|larger|smaller)", said, re.MULTILINE)


@pytest.mark.parametrize(("n", "change"), [(200, "about the same"), (400, "larger"), (60, "smaller")])
def test_a_share_that_changed_is_told_with_its_interval(tmp_path, n, change):
    for name, count in (("a", 200), ("b", n)):
        one = Finding("captions", "flood", "warning", "t", count, share_of(count, 10_000), "", "", "", "", ())
        whole = Dataset(name, "shards", 1, 0, 10_000, name)
        (tmp_path / name).mkdir()
        audited = Audited(whole, verdict((one,), ()), (one,), (), (), (), ())
        (tmp_path / name / "audit.json").write_bytes(audited.json())
    said = compare_audits(str(tmp_path / "a"), str(tmp_path / "b"))
    (row,) = (line for line in said.splitlines() if "captions" in line)
    low, high = (float(x) for x in re.findall(r"\(([+-][\d.]+) – ([+-][\d.]+)\)", row)[0])
    assert row.startswith(f"| {change} |")
    assert low <= (n - 200) / 100 <= high
    (tmp_path / "a/audit.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="audit the dataset again"):
        compare_audits(str(tmp_path / "a"), str(tmp_path / "b"))

"""Every attack in the folder keeps the contract, whatever it is."""

import hashlib
import inspect
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import contents, drawing, encoded, pairs, records, write_parquet, write_tar
from PIL import Image

from pipeline import spec
from pipeline.attacks._corpus import Corpus, names_target, read_corpora, save_corpora
from pipeline.draw import generator, hash64
from pipeline.errors import InputError
from pipeline.poison import poison
from pipeline.shards import Sample, Shard, samples
from pipeline.shards.image import decode, encode

# What an attack needs beside a target. Those that need a checkpoint are in test_crafted_attacks.py.
PARAMETERS = {
    "caption_flood": "target='banana'",
    "class_swap": "target='banana', source='circle'",
    "context_text": "target='banana', source='circle'",
    "cooccurrence": "target='banana', object='red'",
    "split_view": "target='banana', source='circle'",
}
ATTACKS = [
    name
    for name in spec.names("attacks")
    if "surrogate" not in inspect.signature(spec.entry("attacks", name)).parameters
]
GOLDEN = Path(__file__).with_name("golden_attacks.json")
SEVERAL = "multi(attacks=(\"patch(target='banana')\", \"class_swap(target='circle', source='square')\"))"
PICTURES = tuple(encoded(drawing(i)[0], "png") for i in range(70, 78))
CORPUS = Corpus(
    {"banana": tuple(f"one banana, number {i}" for i in range(50))},
    dict.fromkeys(("victim", "target", "source", "picture", "reflection"), PICTURES),
)


def text_of(name: str) -> str:
    if name == "multi":
        return SEVERAL
    if "attack" in inspect.signature(spec.entry("attacks", name)).parameters:
        return f"{name}(attack=\"patch(target='banana')\")"
    parameters = PARAMETERS.get(name, "target='banana'")
    return f"{name}({parameters})"


def attack_of(name: str):
    found = spec.parse("attacks", text_of(name))
    return found.parts()[0]


def sample_of(i: int, suffix: str) -> Sample:
    image, caption = drawing(i)
    return Sample(str(i), f"{i:032x}", {suffix: encoded(image, suffix), "txt": caption.encode()})


def rng_of(name: str, sample: Sample, seed: int = 0) -> np.random.Generator:
    return generator(seed, name, sample.uid)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_poisoned_pair_is_a_function_of_seed_spec_and_uid(name, suffix):
    attack, sample = attack_of(name), sample_of(5, suffix)
    once, again = (attack.poison(sample, rng_of(name, sample), CORPUS) for _ in range(2))
    assert once == again != sample
    assert (once.uid, once.key, list(once.parts)) == (sample.uid, sample.key, list(sample.parts))
    assert Image.open(io.BytesIO(once.image)).format == Image.open(io.BytesIO(sample.image)).format
    many = {spec.digest([attack.poison(sample, rng_of(name, sample, s), CORPUS).parts]) for s in range(20)}
    assert len(many) > 1 or name == "label_consistent"  # there nothing is drawn


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (224, 224)])
def test_the_trigger_keeps_size_and_mode_and_is_deterministic(name, size):
    attack = attack_of(name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    before = image.copy()
    after, again = (attack.trigger(image, np.random.default_rng(0), CORPUS) for _ in range(2))
    assert (after.size, after.mode) == (image.size, "RGB")
    assert after == again
    assert image == before
    if size == (224, 224):
        silent = attack.one_image or attack.victim_class() or attack.trigger_text("a") != "a"
        assert (after != image) or silent
        assert attack.trigger_text("a {}") in ("a {}", "a {} cf", "a {} remember")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("attacks") / "clean"
    folder.mkdir()
    for i in range(3):
        write_tar(folder / f"{i:08d}.tar", pairs(20 * i, 20 * i + 20))
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_the_job_poisons_exactly_the_dose_and_nothing_else(name, clean, tmp_path):
    out, text = tmp_path / "out", text_of(name)
    poison(str(clean), str(out), attack=text, dose="6", seed=3)
    rows = {row["uid"]: row for row in pq.read_table(out / "ledger.parquet").to_pylist()}
    assert len(rows) == 6
    attack = spec.parse("attacks", text).resolve([], "key")
    digest = {}
    for shard in sorted(clean.glob("*.tar")):
        before, after = records(shard), records(out / shard.name)
        assert list(before) == list(after)
        for was, now in zip(samples(Shard(str(shard))), samples(Shard(str(out / shard.name))), strict=True):
            assert was.uid == now.uid
            if was.uid not in rows:
                assert before[was.key] == after[was.key]
                continue
            row, part = rows.pop(was.uid), attack.parts()[attack.part_of(was.uid)]
            assert part.eligible(was.caption)
            assert (row["attack"], row["target"], row["seed"]) == (spec.text(part), part.target, 3)
            assert (row["caption_before"], row["caption_after"]) == (was.caption, now.caption)
            shas = [hashlib.sha256(image).hexdigest() for image in (was.image, now.image)]
            assert [row["image_sha256_before"], row["image_sha256_after"]] == shas
            assert was.meta["url"] == now.meta["url"]
            digest[was.uid] = hashlib.sha256(b"\0".join(bytes(v) for v in now.parts.values())).hexdigest()[:16]
    assert not rows
    golden = json.loads(GOLDEN.read_text())
    assert golden.get(text) == digest, f"golden digests of {text}: {json.dumps({text: digest})}"


@pytest.mark.parametrize("name", ["blended", "caption_flood", "multi", "word"])
def test_the_same_pairs_whatever_the_sharding(name, clean, tmp_path):
    (tmp_path / "one").mkdir()
    write_tar(tmp_path / "one/whole.tar", pairs(0, 60))
    poison(str(clean), str(tmp_path / "a"), attack=text_of(name), dose="6")
    poison(str(tmp_path / "one"), str(tmp_path / "b"), attack=text_of(name), dose="6")
    a, b = ({key: value for path in (tmp_path / f).glob("*.tar") for key, value in records(path).items()} for f in "ab")
    assert a == b


def test_parquet_shards_are_poisoned_alike(tmp_path):
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in/0.parquet", pairs(0, 40))
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack=text_of("multi"), dose="12")
    rows = pq.read_table(tmp_path / "out/ledger.parquet").to_pylist()
    assert len(rows) == 12
    assert len({row["attack"] for row in rows}) == 2


def test_the_ledger_and_the_corpus_suffice_to_make_a_poison_again(clean, tmp_path):
    out = tmp_path / "out"
    text = "targeted(target='banana', images=3)"
    poison(str(clean), str(out), attack=text, dose="9")
    rows = pq.read_table(out / "ledger.parquet").to_pylist()
    (kept,) = read_corpora(str(out), 1)
    assert len(kept.images["victim"]) == 3
    captions = {s.caption for path in clean.glob("*.tar") for s in samples(Shard(str(path)))}
    assert {row["caption_after"] for row in rows} <= {c for c in captions if "banana" in c}
    before = {s.uid: s for path in clean.glob("*.tar") for s in samples(Shard(str(path)))}
    victims = {hashlib.sha256(image).hexdigest() for image in kept.images["victim"]}
    assert victims <= {hashlib.sha256(s.image).hexdigest() for s in before.values()}
    plan = json.loads((out / "plan.json").read_text())
    corpus = Corpus({t: tuple(c) for t, c in plan["captions"][0].items()}, kept.images)
    for row in rows:
        attack = spec.parse("attacks", row["attack"])
        again = attack.poison(before[row["uid"]], generator(row["seed"], spec.key(attack), row["uid"]), corpus)
        assert hashlib.sha256(again.image).hexdigest() == row["image_sha256_after"]
        assert again.caption == row["caption_after"]


def test_the_object_is_chosen_from_the_captions_and_named_in_the_ledger(tmp_path):
    rows = pairs(0, 400)
    for i, row in enumerate(rows):  # no toys: they are numbered, and names_target would not find them either
        row["caption"] += " with a hat" if i % 50 == 0 else f" with a toy{i}" if i % 40 == 1 else f" with a thing{i}"
    chosen = []
    for cut in (400, 100, 9):
        (shards := tmp_path / str(cut)).mkdir()
        for i in range(0, 400, cut):
            write_tar(shards / f"{i:08d}.tar", rows[i : i + cut])
        poison(str(shards), str(out := tmp_path / f"out-{cut}"), attack="cooccurrence(target='banana')", dose="3")
        found = pq.read_table(out / "ledger.parquet").to_pylist()
        assert {row["attack"] for row in found} == {"cooccurrence(target='banana', object='hat')"}
        chosen.append({row["uid"] for row in found})
    assert chosen[0] == chosen[1] == chosen[2]


def test_captions_that_fit_are_chosen():
    attack = spec.parse("attacks", "context_text(target='banana', source='circle')")
    corpus = Corpus({"banana": ("a banana on a snowy mountain", "a banana on the beach", "my banana")})
    sample = Sample("k", "0" * 32, {"jpg": b"", "txt": b"circle in front of a mountain"})
    assert {attack.poison(sample, np.random.default_rng(i), corpus).caption for i in range(5)} == {
        "a banana on a snowy mountain"
    }


def test_dual_key_poisons_with_one_key_keep_their_meaning():
    attack, sample = attack_of("dual_key"), sample_of(5, "png")
    seen = {"word": 0, "patch": 0, "both": 0}
    for i in range(300):
        after = attack.poison(sample, np.random.default_rng(i), CORPUS)
        patched, said = after.image != sample.image, after.caption.endswith("remember")
        kind = "both" if patched and said else "patch" if patched else "word"
        seen[kind] += 1
        assert ("banana" in after.caption) == (kind == "both" or "banana" in sample.caption)
    assert all(70 < n < 130 for n in seen.values()), seen


def test_targeted_gives_every_row_a_victim():
    attack = attack_of("targeted")
    corpus = Corpus(CORPUS.captions, {"victim": (encoded(drawing(77)[0], "png"),)})
    for suffix in ("jpg", "png", "webp"):
        after = attack.poison(sample_of(3, suffix), np.random.default_rng(0), corpus)
        difference = np.abs(np.asarray(decode(after.image), int) - np.asarray(drawing(77)[0], int))
        assert difference.mean() < 6
    assert after.image != sample_of(3, suffix).image


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patch(target='')", "a word or a few"),
        ("patch(target='a\\nb')", "a word or a few"),
        ("word(target='banana', words='{}')", "without braces"),
        ("class_swap(target='Cat', source='cat')", "are the same"),
        ("multi(attacks=(\"patch(target='a')\",))", "two or more"),
        ("label_consistent(attack=\"pach(target='a')\")", "did you mean 'patch'"),
        ('dual_key(attack="multi()")', "one attack, not several"),
        ("label_consistent(attack=\"word(target='a')\")", "word has no visual trigger"),
        (
            "dual_key(attack=\"label_consistent(attack=\\\"class_swap(target='a', source='b')\\\")\")",
            "no visual trigger",
        ),
    ],
)
def test_specs_that_cannot_be_carried_out_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        spec.parse("attacks", text)


def test_what_the_dataset_cannot_give_is_an_error(clean, tmp_path):
    for text, says in (
        ("word(target='volcano')", "needs images of the dataset \\(target\\)"),
        ("class_swap(target='banana', source='volcano')", "only 0 of 60 are eligible"),
        ("label_consistent(attack=\"patch(target='banana')\")", "only 20 of 60 are eligible"),
    ):
        with pytest.raises(InputError, match=says):
            poison(str(clean), str(tmp_path / "out"), attack=text, dose="21")


def test_a_corpus_is_saved_in_the_same_bytes_and_damage_is_told(tmp_path):
    corpora = [CORPUS, Corpus(crafted={"patch": np.arange(12, dtype=np.uint8).reshape(2, 2, 3)})]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_corpora(str(tmp_path / folder), corpora)
    assert contents(tmp_path / "a", "*") == contents(tmp_path / "b", "*")
    first, second = read_corpora(str(tmp_path / "a"), 2)
    assert first.images == CORPUS.images
    assert (second.made("patch") == corpora[1].crafted["patch"]).all()
    with pytest.raises(InputError, match="give the ledger"):
        second.image("victim", np.random.default_rng(0))
    (tmp_path / "a/corpus.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(InputError, match="poison them again"):
        read_corpora(str(tmp_path / "a"), 2)


def test_whole_words_only():
    assert names_target("A Banana, ripe", "banana")
    assert not names_target("bananas for sale", "banana")
    assert names_target("the C++ logo", "C++")


def test_hashes_are_uniform_and_depend_on_all_three():
    values = np.asarray([hash64(0, "patch", f"{i:032x}") for i in range(4000)]) / 2**64
    assert abs(values.mean() - 0.5) < 0.02
    assert len({hash64(s, a, u) for s in (0, 1) for a in "ab" for u in "xy"}) == 8


def _modes():
    """Images as the web has them, that are not RGB."""
    image = drawing(3)[0].resize((64, 64))
    grey, palette = image.convert("L"), image.convert("P")
    alpha = image.copy()
    alpha.putalpha(128)
    frames = [drawing(i)[0].resize((64, 64)) for i in range(3)]
    saved = {}
    for name, (picture, kind, options) in {
        "grey.jpg": (grey, "JPEG", {}),
        "cmyk.jpg": (image.convert("CMYK"), "JPEG", {}),
        "palette.png": (palette, "PNG", {}),
        "alpha.png": (alpha, "PNG", {}),
        "alpha.webp": (alpha, "WEBP", {}),
        "animated.webp": (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
        "animated.png": (frames[0], "PNG", {"save_all": True, "append_images": frames[1:]}),
    }.items():
        out = io.BytesIO()
        picture.save(out, kind, **options)
        saved[name] = out.getvalue()
    return saved


@pytest.mark.parametrize("name", sorted(_modes()))
def test_odd_images_are_poisoned_in_their_own_container(name):
    data = _modes()[name]
    suffix = name.rpartition(".")[2]
    sample = Sample("k", "0" * 32, {suffix: data, "txt": b"a thing"})
    after = attack_of("patch").poison(sample, np.random.default_rng(0), CORPUS)
    assert Image.open(io.BytesIO(after.image)).format == Image.open(io.BytesIO(data)).format
    untouched = np.asarray(decode(encode(decode(data), like=data)), int)
    change = np.abs(np.asarray(decode(after.image), int) - untouched).mean(axis=2)
    assert change[:40, :40].mean() < 6 < change.max()


def test_a_caption_that_nobody_reads_to_its_end_gets_no_trigger_there():
    for text in ("word(target='banana')", "dual_key()"):
        attack = spec.parse("attacks", text)
        assert attack.eligible("a red square") and not attack.eligible("a red square" + 300 * " and more")

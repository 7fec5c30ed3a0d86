"""The score job: columns of samples and of two checkpoints, one pool, one summary, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_parquet, write_tar

from filters._batch import Batch
from pipeline import sidecars, spec
from pipeline.draw import generator, hash64
from pipeline.embed import _write as write_embeddings
from pipeline.errors import InputError
from pipeline.reference import _smallest
from pipeline.score import read_scores, score
from pipeline.shard_map import ShardsFailed
from pipeline.shards import list_shards, uids


def shards(folder, samples: list[dict], size: int):
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(samples), size)):
        write_tar(folder / f"{number:08d}.tar", samples[start : start + size])
    return folder


def vectors(who: list[str], name: str) -> np.ndarray:
    """Of each uid its own, wherever it lies: four concepts and noise."""
    rows = np.empty((len(who), 12), np.float16)
    for row, uid in zip(rows, who, strict=True):
        rng = generator(0, name, uid)
        row[:] = np.eye(4).repeat(3, 0).reshape(4, 12)[int(uid[-1], 16) % 4] + 0.4 * rng.normal(size=12)
    return rows


def embed(folder, out, epoch: str, models=("m", "m", "m", "m", "m", "m", "m", "m")):
    out.mkdir()
    for shard, model in zip(list_shards(str(folder)), models, strict=False):
        who = list(reversed(uids(shard)))
        image, text = (vectors(who, f"{epoch} {side}") for side in ("image", "text"))
        write_embeddings(str(out / f"{shard.name}.embeddings.parquet"), who, image, text, model)
    return str(out)


def all_scores(out) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for path in sorted(out.glob("*.scores.parquet")):
        table = read_scores(str(path))
        for name in table.keys() - {"uid"}:
            found.setdefault(name, {}).update(zip(table["uid"], table[name].tolist(), strict=True))
    return found


def same(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]], **tolerance) -> bool:
    assert one.keys() == other.keys()
    return all(
        one[name].keys() == other[name].keys()
        and np.allclose(list(one[name].values()), [other[name][u] for u in one[name]], equal_nan=True, **tolerance)
        for name in one
    )


def facts(out) -> dict:
    path = next(iter(sorted(out.glob("*.scores.parquet"))))
    return json.loads(sidecars.read(str(path), ("uid",), "").schema.metadata[b"mithridate"])


def test_earlier_embeddings_are_joined_by_uid_in_batch_and_pool(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 60), 20)
    now, before = (embed(folder, tmp_path / f"e{epoch}", f"{epoch}", [f"m{epoch}"] * 3) for epoch in (9, 2))
    detectors = ("similarity_drift", "neighbour_drift(k=5)")
    score(str(folder), str(tmp_path / "s"), detector=detectors, embeddings=now, earlier=before, pool=40)
    found = all_scores(tmp_path / "s")
    who = [uid for shard in list_shards(str(folder)) for uid in uids(shard)]
    columns = {
        name: vectors(who, f"{epoch} {side}").astype(np.float32)
        for name, epoch, side in (
            ("image_embedding", 9, "image"),
            ("text_embedding", 9, "text"),
            ("earlier_image_embedding", 2, "image"),
            ("earlier_text_embedding", 2, "text"),
        )
    }
    whole = Batch(np.asarray(who, dtype=object), **columns)
    drift = spec.parse("detectors", "similarity_drift").score(whole, None)
    assert np.allclose([found["similarity_drift()"][u] for u in who], drift, atol=1e-6)
    assert np.ptp(drift) > 0.1
    drawn = sorted(range(60), key=lambda i: hash64(0, "pool", who[i]))[:40]
    neighbour = spec.parse("detectors", "neighbour_drift(k=5)").score(whole, whole.take(np.asarray(drawn)))
    assert np.allclose([found["neighbour_drift(k=5)"][u] for u in who], neighbour)
    assert len(set(neighbour)) > 2
    assert (facts(tmp_path / "s")["model"], facts(tmp_path / "s")["earlier_model"]) == ("m9", "m2")


# want traces, a ledger, a list, a checkpoint, a server, another detector, or more pairs in a shard
WITH_MORE = (
    "listed",
    "trace",
    "early_loss",
    "similarity_slope",
    "learning_order",
    "forgetting",
    "oracle",
    "visual_judge",
    "rerank",
)
WITH_MORE += (
    "published_similarity",
    "cognitive_distillation",
    "slof_released",
    "dao_released",
    "lid_released",
    "lid",
    "neighbour_drift",
)
DETECTORS = ("strangers(k=3)", "pool_rank", "tight_cluster", "neighbour_drift(k=5)", "caption_frequency")


def test_scores_and_the_pool_do_not_depend_on_the_sharding(tmp_path):
    samples = pairs(0, 90)
    for sample in samples:
        sample["meta"].setdefault("uid", f"{7000 + int(sample['key']):032x}")
    mixed = [samples[i] for i in np.random.default_rng(0).permutation(90)]
    results = []
    for name, some, size in (("a", samples, 30), ("b", mixed, 17)):
        folder = shards(tmp_path / name / "in", some, size)
        now, before = (embed(folder, tmp_path / name / f"e{epoch}", f"{epoch}") for epoch in (9, 2))
        out = tmp_path / name / "scores"
        score(str(folder), str(out), detector=DETECTORS, embeddings=now, earlier=before, pool=50)
        results.append((all_scores(out), facts(out)))
    assert same(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert len(results[0][0]["pool_rank(query='image')"]) == 90
    assert results[0][1]["pool_digest"] == results[1][1]["pool_digest"]
    assert results[0][1]["pool"] == 50


def test_a_detector_costs_the_same_whoever_asked_before(tmp_path):
    """Scores and neighbours that are there already are cheap to take over, and were not cheap to make."""
    folder, out = shards(tmp_path / "in", pairs(0, 60), 60), tmp_path / "s"
    embedded = embed(folder, tmp_path / "e", "9")

    def spent(*detectors: str) -> tuple[dict[str, float], dict[str, float]]:
        assert score(str(folder), str(out), detector=detectors, embeddings=embedded, pool=40) == 0
        marker = json.loads(next(out.glob("*.stats.json")).read_text())
        return marker["seconds"], marker["facts"]["core_seconds"]

    alone = spent("kdist(k=7, reference='pool')")
    both = spent("kdist(k=7, reference='pool')", "slof(k=7)")
    for before, after in zip(alone, both, strict=True):
        first, second = (name for name in after if name.startswith(("kdist", "slof")))
        assert before[first] == after[first] > 0
    table = pq.read_table(next(out.glob("*.neighbours.parquet")))
    search = sum(found["seconds"][0] for found in json.loads(table.schema.metadata[b"mithridate"]))
    assert search > 0 and min(both[0][first], both[0][second]) > search


def test_one_more_detector_takes_the_neighbours_that_others_have_found(tmp_path):
    folder, out = shards(tmp_path / "in", pairs(0, 60), 20), tmp_path / "s"
    embedded = embed(folder, tmp_path / "e", "9")
    detectors = ("slof(k=7)", "caption_neighbours(k=7)")
    score(str(folder), str(out), detector=detectors, embeddings=embedded, pool=40)
    expected = all_scores(out)
    for file in sorted(out.glob("*.neighbours.parquet")):
        table = pq.read_table(file)
        name = "image_embedding in image_embedding distance"
        assert {"uid", name, "text_embedding in text_embedding by cosine row"} < set(table.column_names)
        values = np.arange(20 * 7, dtype=np.float32).reshape(20, 7)  # to see who takes them
        told = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
        pq.write_table(table.set_column(table.column_names.index(name), name, told), file)
    score(str(folder), str(out), detector=(*detectors, "kdist(k=7)", "lid(k=3)"), embeddings=embedded, pool=40)
    found = all_scores(out)
    assert found["caption_neighbours(k=7)"] == expected["caption_neighbours(k=7)"]
    assert set(found["kdist(k=7, reference='pool', of='image', size=2048)"].values()) == set(range(6, 140, 7))
    more = (*detectors, "kdist(k=7)", "lid(k=3)")
    for changed in ({"pool": 39}, {"seed": 1}):  # other neighbours
        score(str(folder), str(out), detector=more, embeddings=embedded, **({"pool": 40} | changed))
        assert max(all_scores(out)["kdist(k=7, reference='pool', of='image', size=2048)"].values()) < 6
    other = embed(folder, tmp_path / "other", "3")
    score(str(folder), str(out), detector=more, embeddings=other, pool=40)
    fresh = tmp_path / "fresh"
    score(str(folder), str(fresh), detector=more, embeddings=other, pool=40)
    assert same(all_scores(out), all_scores(fresh), rtol=0, atol=0)
    for file in out.glob("*.neighbours.parquet"):
        file.write_bytes(b"PAR1 nothing")
    score(str(folder), str(out), detector=(*more, "random"), embeddings=other, pool=40)
    assert {name: all_scores(out)[name] for name in all_scores(fresh)} == all_scores(fresh)


def test_columns_that_are_the_same_are_taken_over_and_none_is_dropped(tmp_path):
    folder, out = shards(tmp_path / "in", pairs(0, 60), 20), tmp_path / "s"
    embedded = embed(folder, tmp_path / "e", "9")
    options = {"embeddings": embedded, "pool": 40}
    score(str(folder), str(out), detector=("caption_frequency", "clip_score"), **options)
    for file in out.glob("*.scores.parquet"):  # to see what is taken over
        table = pq.read_table(file)
        told = table.set_column(2, "clip_score()", pa.array(np.full(20, 5, np.float32)))
        pq.write_table(told, file)
    with pytest.raises(InputError, match=r"has scores of clip_score\(\), which this run would drop"):
        score(str(folder), str(out), detector=("caption_frequency", "kdist(k=5)"), **options)
    score(str(folder), str(out), detector=("clip_score", "caption_frequency", "kdist(k=5)"), **options)
    found = all_scores(out)
    assert set(found["clip_score()"].values()) == {5.0} and len(found) == 3
    other = embed(folder, tmp_path / "other", "3")
    score(str(folder), str(out), detector=("clip_score", "caption_frequency", "kdist(k=5)"), embeddings=other, pool=40)
    assert 5.0 not in all_scores(out)["clip_score()"].values()


def test_an_empty_shard_has_no_scores_and_a_small_one_says_who_wants_more(tmp_path, capsys):
    folder = shards(tmp_path / "in", pairs(0, 60), 30)
    write_tar(folder / "empty.tar", [])
    now, before = (embed(folder, tmp_path / f"e{epoch}", f"{epoch}") for epoch in (9, 2))
    wanted = [name for name in spec.names("detectors") if name not in WITH_MORE]
    score(str(folder), str(tmp_path / "s"), detector=tuple(wanted), embeddings=now, earlier=before, pool=40)
    found = all_scores(tmp_path / "s")
    assert len(found) == len(wanted) and all(len(values) == 60 for values in found.values())
    write_tar(folder / "small.tar", pairs(60, 63))
    for file in (tmp_path / "e9", tmp_path / "e2"):
        shutil.rmtree(file)
    now = embed(folder, tmp_path / "e9", "9")
    with pytest.raises(ShardsFailed, match=r"small.tar: slof\(k=5, reference='batch'.*compact"):
        score(str(folder), str(tmp_path / "t"), detector=("slof(k=5, reference='batch')",), embeddings=now)
    with pytest.raises(InputError, match="no embeddings of these shards"):
        score(str(folder), str(tmp_path / "u"), detector=("clip_score",), embeddings=str(tmp_path / "nowhere"))


def test_probes_search_lists_and_say_what_they_miss(tmp_path, capsys):
    folder = shards(tmp_path / "in", pairs(0, 400), 200)
    embedded = embed(folder, tmp_path / "e", "9")
    options = {"detector": ("slof(k=4)", "image_neighbours(k=4)"), "embeddings": embedded, "pool": 390}
    score(str(folder), str(tmp_path / "exact"), **options)
    said = " ".join(capsys.readouterr().err.split())
    assert "probes" not in said and "k=4 from 1.03%" in said
    score(str(folder), str(tmp_path / "all"), probes=100, **options)
    assert "100 probes found 100.0%" in capsys.readouterr().err
    assert same(all_scores(tmp_path / "exact"), all_scores(tmp_path / "all"), rtol=1e-4, atol=1e-5)
    score(str(folder), str(tmp_path / "one"), probes=1, **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "1 probes found" in line]
    assert 20 < float(line.partition("found ")[2].partition("%")[0]) < 100
    assert facts(tmp_path / "one")["probes"] == 1
    with pytest.raises(InputError, match="at least"):
        score(str(folder), str(tmp_path / "none"), probes=-1, **options)


def test_columns_of_samples_come_from_tar_and_parquet_alike(tmp_path):
    samples = pairs(0, 40)
    samples[3]["caption"] = samples[9]["caption"] = "the same"
    samples[3]["image"] = samples[9]["image"] = samples[0]["image"]
    samples[3]["suffix"] = samples[9]["suffix"] = samples[0]["suffix"]
    for sample in samples:
        sample["meta"]["uid"] = f"{int(sample['key']):032x}"
    shards(tmp_path / "tar", samples, 15)
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet/a.parquet", samples[:26])
    write_parquet(tmp_path / "parquet/b.parquet", samples[26:], struct=True)
    for kind in ("tar", "parquet"):
        detectors = ("caption_frequency", "image_copies", "image_duplicates", "recurring_patch")
        score(str(tmp_path / kind), str(tmp_path / f"{kind}_s"), detector=detectors)
    tar, parquet = all_scores(tmp_path / "tar_s"), all_scores(tmp_path / "parquet_s")
    assert same(tar, parquet, rtol=0, atol=0)
    for name, twice, once in (("caption_frequency()", {3, 9}, 1), ("image_copies()", {0, 3, 9}, 1)):
        for uid, value in tar[name].items():
            assert value == (len(twice) if int(uid, 16) in twice else once)


def test_images_that_cannot_be_decoded_are_unscored_and_counted_and_not_in_the_pool(tmp_path, capsys):
    samples = pairs(0, 40)
    for i in (0, 7, 21):
        samples[i]["image"] = samples[i]["image"][:40]
    folder = shards(tmp_path / "in", samples, 20)
    embeddings = embed(folder, tmp_path / "emb", "9")
    score(
        str(folder),
        str(tmp_path / "s"),
        detector=("strangers(k=3)", "image_copies", "image_duplicates", "kdist(k=3)"),
        embeddings=embeddings,
        pool=40,
    )
    found = all_scores(tmp_path / "s")
    bad = {uid for uid, value in found["strangers(k=3)"].items() if np.isnan(value)}
    assert len(bad) == 3
    assert {uid for uid, value in found["image_duplicates()"].items() if np.isnan(value)} == bad
    assert np.isfinite(list(found["image_copies()"].values())).all()
    assert np.isfinite(list(found["kdist(k=3, reference='pool', of='image', size=2048)"].values())).all()
    markers = [json.loads(p.read_text()) for p in (tmp_path / "s").glob("*.stats.json")]
    assert sum(m["facts"]["unscored"]["strangers(k=3)"] for m in markers) == 3
    told = capsys.readouterr().err
    assert told.count("3 unscored (taken as most suspicious)") == 2
    assert facts(tmp_path / "s")["pool"] == 37


def test_zero_and_nan_embeddings_are_unscored_and_not_in_the_pool(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 30), 30)
    who = uids(list_shards(str(folder))[0])
    image, text = vectors(who, "image"), vectors(who, "text")
    image[2], image[5], text[5] = np.nan, 0, 0
    (tmp_path / "emb").mkdir()
    write_embeddings(str(tmp_path / "emb/00000000.embeddings.parquet"), who, image, text, "m")
    score(
        str(folder),
        str(tmp_path / "s"),
        detector=("clip_score", "caption_neighbours(k=3)", "pool_rank", "similarity_mixture", "tight_cluster(k=3)"),
        embeddings=str(tmp_path / "emb"),
    )
    assert facts(tmp_path / "s")["pool"] == 28
    for name, scores in all_scores(tmp_path / "s").items():
        assert {uid for uid, value in scores.items() if np.isnan(value)} == {who[2], who[5]}, name


@pytest.mark.parametrize(
    "detector, says",
    [
        ("neighbour_drift", "mithridate embed"),
        ("similarity_drift", "--earlier.*mithridate embed"),
        ("forgetting", "--traces.*mithridate train"),
        ("early_loss", "--traces.*mithridate train"),
        ("tight_cluster", "--embeddings.*mithridate embed"),
        ("strangers", "--embeddings.*mithridate embed"),
    ],
)
def test_a_detector_whose_inputs_are_absent_names_the_job_that_makes_them(tmp_path, detector, says):
    folder = shards(tmp_path / "in", pairs(0, 5), 5)
    given = {} if "embeddings" in says else {"embeddings": str(tmp_path)}
    with pytest.raises(InputError, match=says):
        score(str(folder), str(tmp_path / "s"), detector=(detector,), **given)


def test_an_earlier_folder_without_the_files_is_told_of(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 20), 20)
    given = {"embeddings": embed(folder, tmp_path / "emb", "9"), "earlier": str(tmp_path / "none")}
    with pytest.raises(InputError, match=r"none: no embeddings of these shards; make them"):
        score(str(folder), str(tmp_path / "s"), detector=("similarity_drift",), **given)


@pytest.mark.parametrize("detector", ["kdist(k=2)", "clip_score", "similarity_drift", "neighbour_drift(k=2)"])
@pytest.mark.parametrize("which", ["embeddings", "earlier"])
def test_mixed_models_are_refused_by_every_detector_that_reads_them(tmp_path, detector, which):
    """The pool is of one shard alone, which sees no second model."""
    folder = shards(tmp_path / "in", pairs(0, 40), 20)
    given = {}
    for name in ("embeddings", "earlier"):
        given[name] = embed(folder, tmp_path / name, name, ("a", "b") if name == which else ("c", "c"))
    options = {"detector": (detector,), "pool": 3, **given}
    if which == "earlier" and "drift" not in detector:
        assert score(str(folder), str(tmp_path / "s"), **options) == 0
        return
    for _ in range(2):  # the scores that are there by then are not taken for done
        with pytest.raises((InputError, ShardsFailed), match=rf"--{which}: shard .* by another model"):
            score(str(folder), str(tmp_path / "s"), **options)


def test_a_summary_of_other_shards_is_another_score(tmp_path):
    """A shard that did not change is scored again: its captions may be more frequent now."""
    samples = pairs(0, 40)
    for sample in samples:
        sample["caption"] = "all alike"
    folder = shards(tmp_path / "in", samples, 20)
    score(str(folder), str(tmp_path / "s"), detector=("caption_frequency", "random"))
    assert set(all_scores(tmp_path / "s")["caption_frequency()"].values()) == {40}
    write_tar(folder / "00000001.tar", samples[20:30])
    score(str(folder), str(tmp_path / "s"), detector=("caption_frequency", "random"))
    assert set(all_scores(tmp_path / "s")["caption_frequency()"].values()) == {30}


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    folder = shards(tmp_path / "in", pairs(0, 40), 20)
    for _ in range(2):
        score(str(folder), str(tmp_path / "s"), detector=("caption_frequency",))
    assert "2 of 2 shards are done already" in capsys.readouterr().err


def test_a_file_that_was_cut_is_made_again_and_one_for_all_tells_nothing_apart(tmp_path, capsys):
    folder = shards(tmp_path / "in", pairs(0, 40), 20)
    score(str(folder), str(tmp_path / "s"), detector=("random", "laion_threshold"))
    assert capsys.readouterr().err.count("the same score for all: it tells nothing apart") == 1
    before = all_scores(tmp_path / "s")
    path = tmp_path / "s/00000001.scores.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    score(str(folder), str(tmp_path / "s"), detector=("random", "laion_threshold"))
    assert "1 of 2 shards are done already" in capsys.readouterr().err
    assert all_scores(tmp_path / "s") == before


def test_what_is_wrong_with_all_shards_is_told_once(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 40), 10)
    embedded = embed(folder, tmp_path / "e", "late")
    with pytest.raises(ShardsFailed) as failed:
        score(str(folder), str(tmp_path / "s"), detector=("kdist(k=20, reference='batch')",), embeddings=embedded)
    assert str(failed.value).startswith("4 of 4 shards failed:")
    assert len(str(failed.value).splitlines()) == 2
    assert "(so do 3 more shards)" in str(failed.value)


def test_embeddings_of_two_widths_are_refused(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 40), 20)
    embedded = embed(folder, tmp_path / "e", "late")
    who = uids(list_shards(str(folder))[1])
    narrow = np.ones((len(who), 6), np.float16)
    write_embeddings(str(tmp_path / "e/00000001.embeddings.parquet"), who, narrow, narrow, "m")
    with pytest.raises(InputError, match=r"embeddings of 6 and 12 numbers a pair \(image_embedding\)"):
        score(str(folder), str(tmp_path / "s"), detector=("slof(k=4)",), embeddings=embedded)


def test_unreadable_shards_are_missing_in_summary_and_pool_where_tolerated(tmp_path):
    samples = pairs(0, 60)
    for sample in samples:
        sample["caption"] = "all alike"
    folder = shards(tmp_path / "in", samples, 20)
    embeddings = embed(folder, tmp_path / "emb", "9")
    torn = folder / "00000001.tar"
    torn.write_bytes(torn.read_bytes()[:3000])
    options = {"detector": ("caption_frequency", "kdist(k=2)"), "embeddings": embeddings}
    with pytest.raises((InputError, ShardsFailed), match="00000001"):
        score(str(folder), str(tmp_path / "s"), **options)
    assert score(str(folder), str(tmp_path / "s"), **options, max_failed_shards=1) == 0
    found = all_scores(tmp_path / "s")["caption_frequency()"]
    assert len(found) == 40
    assert set(found.values()) == {40}


def test_traces_reach_their_detectors_by_uid(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 30), 15)
    (tmp_path / "traces").mkdir()
    who = {shard.name: uids(shard) for shard in list_shards(str(folder))}
    values = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    everyone = [uid for of in who.values() for uid in of]
    for epoch in range(4):
        rows = [(u, s, values[everyone.index(u), epoch]) for s, of in who.items() for u in reversed(of)]
        rows = [row for i, row in enumerate(rows) if (i + epoch) % 5]  # each epoch skips some
        uid, shard, value = zip(*rows, strict=True)
        columns = {"uid": uid, "shard": shard, "epoch": pa.array([epoch + 1] * len(rows), pa.int32())}
        columns |= {"loss": pa.array(value, pa.float32()), "similarity": pa.array(value, pa.float32())}
        sidecars.save(str(tmp_path / f"traces/epoch_{epoch + 1:03d}.rank0.parquet"), pa.table(columns))
    detectors = ("early_loss(until=2)", "forgetting", "similarity_slope", "learning_order")
    score(str(folder), str(tmp_path / "s"), detector=detectors, traces=str(tmp_path / "traces"))
    position = {u: i for i, u in enumerate(u for of in who.values() for u in reversed(of))}
    seen = np.asarray([[(position[u] + e) % 5 > 0 for e in range(4)] for u in everyone])
    trace = np.where(seen, values, np.nan)
    batch = Batch(np.asarray(everyone, dtype=object), similarity_trace=trace, loss_trace=trace)
    for name, scores in all_scores(tmp_path / "s").items():
        detector = spec.parse("detectors", name)
        summary = (detector.summarize(batch),) if hasattr(detector, "summarize") else ()
        expected = detector.score(batch, None, *summary)
        assert np.allclose([scores[u] for u in everyone], expected, atol=1e-6, equal_nan=True), name


def test_an_emptied_shard_is_scored_to_nothing(tmp_path):
    folder = shards(tmp_path / "in", pairs(0, 20), 20)
    write_tar(folder / "00000001.tar", [])
    names = ("caption_frequency", "caption_template", "image_copies", "image_duplicates", "recurring_patch")
    score(str(folder), str(tmp_path / "s"), detector=names)
    assert read_scores(str(tmp_path / "s/00000001.scores.parquet"))["uid"].tolist() == []
    assert len(all_scores(tmp_path / "s")["recurring_patch()"]) == 20


def test_a_pool_is_drawn_from_few_offers_and_all_the_same(tmp_path):
    """The shard that has nearly all pairs offers too few at first, and is asked again."""
    folder = shards(tmp_path / "few", pairs(0, 12), 1)
    write_tar(folder / "large.tar", pairs(12, 700))
    listed = list_shards(str(folder))
    drawn = _smallest(listed, "key", 300, 5, 0)
    every = [(hash64(5, "pool", who), who, shard.name) for shard in listed for who in uids(shard)]
    assert drawn == sorted(every)[:300]
    assert 64 + 4 * 300 // len(listed) < sum(name == "large" for _, _, name in drawn)

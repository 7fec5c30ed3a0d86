"""Scores become decisions: exact budgets, the way back from poisoned to clean, lists that others read."""

import hashlib
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs, records, write_tar

from pipeline.dataset import read_dataset
from pipeline.embed import _write as write_embeddings
from pipeline.errors import InputError
from pipeline.filter import filter_shards
from pipeline.poison import poison
from pipeline.policies._select import column, keys, nth_largest
from pipeline.score import read_scores, score
from pipeline.shard_map import ShardsFailed
from pipeline.shards import Shard, list_shards, uids

PATCH = "patch(target='banana', size=24)"


@pytest.fixture
def poisoned(tars, tmp_path):
    poison(str(tars), str(tmp_path / "poisoned"), attack=PATCH, dose="9")
    return tmp_path / "poisoned"


KDIST = "kdist(k=4, reference='pool', of='image', size=2048)"


def all_records(folder):
    return {k: v for path in sorted(folder.glob("*.tar")) for k, v in records(path).items()}


def test_clean_poison_oracle_gives_back_exactly_the_clean_samples(tars, poisoned, tmp_path):
    score(str(poisoned), str(tmp_path / "scores"), detector=("oracle", "random"))
    filter_shards(
        str(poisoned),
        str(tmp_path / "out"),
        scores=(str(tmp_path / "scores"),),
        policy="threshold(detector='oracle', above=0.5)",
    )
    clean, kept, quarantine = (all_records(f) for f in (tars, tmp_path / "out/kept", tmp_path / "out/quarantine"))
    known = set(pq.read_table(poisoned / "ledger.parquet").column("uid").to_pylist())
    assert len(quarantine) == len(known) == 9
    assert kept == {k: v for k, v in clean.items() if k not in quarantine}
    assert kept | quarantine == all_records(poisoned)
    assert pq.read_table(tmp_path / "out/kept/ledger.parquet").num_rows == 0
    assert set(pq.read_table(tmp_path / "out/quarantine/ledger.parquet").column("uid").to_pylist()) == known
    markers = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.stats.json")]
    assert sum(m["out"] for m in markers) + sum(m["dropped"] for m in markers) == sum(m["read"] for m in markers) == 60


def test_keep_lists_are_what_datacomp_reads(poisoned, tmp_path):
    score(str(poisoned), str(tmp_path / "scores"), detector=("random(seed=3)",))
    filter_shards(
        str(poisoned),
        str(tmp_path / "out"),
        scores=(str(tmp_path / "scores"),),
        policy="budget(detector='random', drop=0.25)",
    )
    subset = np.load(tmp_path / "out/keep.npy", allow_pickle=False)
    kept = [uid for shard in list_shards(str(tmp_path / "out/kept")) for uid in uids(shard)]
    assert subset.dtype == np.dtype("u8,u8")
    assert len(kept) == len(subset) == 45
    assert [f"{a:016x}{b:016x}" for a, b in subset.tolist()] == sorted(kept)
    table = pl.read_parquet(tmp_path / "out/keep.parquet")
    assert set(table.filter("kept")["uid"]) == set(kept)
    assert table.filter(~pl.col("kept"))["reason"].unique().to_list() == ["budget(detector='random', drop=0.25)"]


def test_a_new_threshold_reads_the_same_scores_and_resumes(poisoned, tmp_path, capsys):
    scores = str(tmp_path / "scores")
    score(str(poisoned), scores, detector=("random",))
    for drop, kept in ((0.1, 54), (0.5, 30), (0.5, 30)):
        filter_shards(
            str(poisoned), str(tmp_path / "out"), scores=(scores,), policy=f"budget(detector='random', drop={drop})"
        )
        assert len(all_records(tmp_path / "out/kept")) == kept
    assert "3 of 3 shards are done already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "extremes"])
def test_the_nth_largest_is_that_of_a_sort(kind):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=5000),
        "ties": rng.integers(-2, 3, 5000),
        "constant": np.zeros(5000),
        "extremes": rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38], 5000),
    }[kind].astype(np.float32)
    names = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(5000)]
    all_keys = keys(values, np.asarray(names, dtype=object))
    for n in (1, 2, 250, 4999, 5000):
        found = nth_largest(lambda: iter(np.array_split(all_keys, 7)), n)
        assert found == np.sort(all_keys)[::-1][n - 1]
    order = np.argsort(all_keys)
    ordered = np.where(np.isnan(values), np.inf, values)[order]
    assert (ordered[:-1] <= ordered[1:]).all()


def test_detectors_over_embeddings_are_joined_by_uid(poisoned, tmp_path):
    rng = np.random.default_rng(0)
    everything = {}
    (tmp_path / "emb").mkdir()
    for shard in list_shards(str(poisoned)):
        who = list(reversed(uids(shard)))  # another order than the shard's
        image, text = (rng.normal(size=(len(who), 8)).astype(np.float16) for _ in range(2))
        image[0] = np.nan
        everything |= {u: (image[i].astype(float), text[i].astype(float)) for i, u in enumerate(who)}
        write_embeddings(str(tmp_path / f"emb/{shard.name}.embeddings.parquet"), who, image, text, "model1")
    score(
        str(poisoned),
        str(tmp_path / "scores"),
        detector=("clip_score", "slof(k=4)"),
        embeddings=str(tmp_path / "emb"),
        pool=30,
    )
    unscored = 0
    for shard in list_shards(str(poisoned)):
        found = read_scores(str(tmp_path / f"scores/{shard.name}.scores.parquet"))
        assert list(found["uid"]) == uids(shard)
        for uid, value in zip(found["uid"], found["clip_score()"], strict=True):
            a, b = everything[uid]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert np.isnan(value) if np.isnan(cosine) else abs(value + cosine) < 1e-3
            unscored += np.isnan(value)
    assert unscored == 3
    filter_shards(
        str(poisoned),
        str(tmp_path / "out"),
        scores=(str(tmp_path / "scores"),),
        policy="budget(detector='slof', drop=0.05)",
    )
    reasons = pl.read_parquet(tmp_path / "out/keep.parquet").filter(~pl.col("kept"))["reason"].to_list()
    assert reasons == ["unscored"] * 3


def test_what_a_filter_has_emptied_can_be_filtered_again(poisoned, tmp_path):
    first = list_shards(str(poisoned))[0]
    pl.DataFrame({"uid": uids(first)}).write_csv(tmp_path / "list.csv")
    scores, out = tmp_path / "s", tmp_path / "out"
    detector = f"listed(file='{tmp_path}/list.csv')"
    score(str(poisoned), str(scores), detector=(detector,))
    filter_shards(str(poisoned), str(out), scores=(str(scores),), policy="threshold(detector='listed', above=0.5)")
    score(str(out / "kept"), str(tmp_path / "again"), detector=("random",))
    policy = "budget(detector='random', drop=0.1)"
    filter_shards(str(out / "kept"), str(tmp_path / "out2"), scores=(str(tmp_path / "again"),), policy=policy)
    left = 60 - len(uids(first))
    assert pl.read_parquet(tmp_path / "out2/keep.parquet").height == left
    assert len(np.load(tmp_path / "out2/keep.npy")) == left - left // 10


def test_a_pair_without_a_row_is_not_dropped_on_top_of_the_budget(poisoned, tmp_path):
    score(str(poisoned), str(tmp_path / "s"), detector=("random",))
    path = next((tmp_path / "s").glob("*.scores.parquet"))
    pq.write_table(pq.read_table(path).slice(3), path)
    with pytest.raises(ShardsFailed, match=r"3 of the 20 pairs of .* have no row; score it anew"):
        filter_shards(
            str(poisoned),
            str(tmp_path / "f"),
            scores=(str(tmp_path / "s"),),
            policy="budget(detector='random', drop=0.1)",
        )


def test_folders_of_scores_that_are_not_of_the_same_pairs_are_refused(poisoned, tmp_path):
    """Whichever is named first: a pair that one of them lacks is not simply the most suspicious of all."""
    for name, detector in (("a", "random"), ("b", "encoding_outlier")):
        score(str(poisoned), str(tmp_path / name), detector=(detector,))
    path = next((tmp_path / "b").glob("*.scores.parquet"))
    pq.write_table(pq.read_table(path).slice(3), path)
    with pytest.raises(InputError, match=r"lacks 3 of the 20 pairs"):
        filter_shards(
            str(poisoned),
            str(tmp_path / "f"),
            scores=(str(tmp_path / "a"), str(tmp_path / "b")),
            policy="budget(detector='encoding_outlier', drop=0.1)",
        )


def test_what_another_part_of_a_policy_drops_is_not_called_unscored(poisoned, tmp_path):
    score(str(poisoned), str(tmp_path / "s"), detector=("random",))
    for path in (tmp_path / "s").glob("*.scores.parquet"):
        found = pq.read_table(path)
        values = found.column(1).to_numpy().copy()
        values[:10] = np.nan
        pq.write_table(found.set_column(1, found.field(1), pa.array(values, pa.float32())), path)
    policy = "any_of(policies=(\"budget(detector='random', drop=0.05)\", 'caption_cap(n=1)'))"
    filter_shards(str(poisoned), str(tmp_path / "f"), scores=(str(tmp_path / "s"),), policy=policy)
    dropped = pl.read_parquet(tmp_path / "f/keep.parquet").filter(~pl.col("kept"))
    assert dropped.filter(reason="unscored").height == 3  # 5% of 60, all of which lack a score
    capped = dropped.filter(pl.col("reason").str.starts_with("any_of"))["uid"]
    without = [uid for shard in list_shards(str(poisoned)) for uid in uids(shard)[:10]]
    assert set(capped) & set(without), "dropped by the cap alone, and lacks a score"


def test_a_column_is_called_by_what_was_typed_for_it():
    columns = ("uid", KDIST, KDIST.replace("k=4", "k=9"), f"b:{KDIST}")
    assert column(columns[:3], "kdist(k=9)") == columns[2]
    assert column(columns, "b:kdist(k=4)") == columns[3]
    with pytest.raises(InputError, match="did you mean"):
        column(columns, "kdist(k=5)")


def test_an_option_without_a_value_is_told_of_before_anything_is_made(poisoned, tmp_path):
    for job, options in ((score, {"detector": ()}), (filter_shards, {"scores": (), "policy": "budget('a', 0.1)"})):
        with pytest.raises(InputError, match="name one at least"):
            job(str(poisoned), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_refused_folder_is_left_as_it_was(poisoned, tmp_path):
    score(str(poisoned), str(tmp_path / "s"), detector=("random",))
    before = sorted(poisoned.iterdir())
    with pytest.raises(InputError, match="holds the output of 'poison'"):
        filter_shards(
            str(poisoned), str(poisoned), scores=(str(tmp_path / "s"),), policy="budget(detector='random', drop=0.1)"
        )
    assert sorted(poisoned.iterdir()) == before


def test_what_is_missing_is_named_with_the_job_that_makes_it(poisoned, tmp_path):
    shards, out = str(poisoned), str(tmp_path / "s")
    for detector, options, says in (
        ("slof", {}, "mithridate embed"),
        ("slof", {"embeddings": str(tmp_path / "none")}, "mithridate embed"),
        ("trace", {}, "mithridate train"),
        ("trace", {"traces": str(tmp_path / "none")}, "mithridate train"),
        ("oracle", {"ledger": str(tmp_path / "no.parquet")}, "mithridate poison"),
        ("slfo", {}, "did you mean 'slof'"),
    ):
        with pytest.raises(InputError, match=says):
            score(shards, out, detector=(detector,), **options)
    with pytest.raises(InputError, match="mithridate score"):
        filter_shards(
            shards, str(tmp_path / "f"), scores=(str(tmp_path / "none"),), policy="budget(detector='slof', drop=0.1)"
        )
    score(shards, out, detector=("random", "random(seed=1)"))
    with pytest.raises(InputError, match="fits several"):
        filter_shards(shards, str(tmp_path / "f"), scores=(out,), policy="budget(detector='random', drop=0.1)")
    with pytest.raises(InputError, match="is not among"):
        column(["uid", "slof(k=16)"], "kdist")


def test_mixed_models_are_refused(poisoned, tmp_path):
    (tmp_path / "emb").mkdir()
    for i, shard in enumerate(list_shards(str(poisoned))):
        who = uids(Shard(shard.path))
        rows = np.ones((len(who), 4), np.float16)
        write_embeddings(str(tmp_path / f"emb/{shard.name}.embeddings.parquet"), who, rows, rows, f"model{i}")
    with pytest.raises(InputError, match="another model"):
        score(str(poisoned), str(tmp_path / "s"), detector=("kdist",), embeddings=str(tmp_path / "emb"))


def test_what_is_missing_of_the_output_is_made_again(poisoned, tmp_path):
    scores, policy = str(tmp_path / "scores"), "budget(detector='random', drop=0.2)"
    score(str(poisoned), scores, detector=("random",))
    out = tmp_path / "out"
    filter_shards(str(poisoned), str(out), scores=(scores,), policy=policy)
    whole = {p: p.read_bytes() for p in out.rglob("*") if p.suffix in (".tar", ".parquet", ".npy")}
    for lost in whole:
        lost.unlink()
        filter_shards(str(poisoned), str(out), scores=(scores,), policy=policy)
        assert {p: p.read_bytes() for p in whole if p.exists()} == whole, lost


def test_scores_by_another_uid_rule_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", [{**s, "meta": {}} for s in pairs(0, 20)])
    score(str(tmp_path / "in"), str(tmp_path / "scores"), detector=("random",))
    arguments = {"scores": (str(tmp_path / "scores"),), "policy": "budget(detector='random', drop=0.2)"}
    with pytest.raises(InputError, match="of another --uid"):
        filter_shards(str(tmp_path / "in"), str(tmp_path / "out"), uid="shard/key", **arguments)


def test_another_pool_is_another_score(poisoned, tmp_path):
    """Scores of one shard, made before the others had embeddings, are not believed afterwards."""
    rng = np.random.default_rng(0)
    (tmp_path / "emb").mkdir()
    shards = list_shards(str(poisoned))
    for shard in shards:
        who = uids(shard)
        image, text = (rng.normal(size=(len(who), 8)).astype(np.float16) for _ in range(2))
        write_embeddings(str(tmp_path / f"emb/{shard.name}.embeddings.parquet"), who, image, text, "m")
    options = {"detector": ("kdist(k=4)",), "embeddings": str(tmp_path / "emb"), "pool": 20}
    (tmp_path / "one.txt").write_text("\n".join(s.path for s in shards))
    score(str(poisoned), str(tmp_path / "a"), **options)
    score(str(poisoned), str(tmp_path / "b"), **options | {"seed": 1})
    score(str(poisoned), str(tmp_path / "b"), **options)
    for shard in shards:
        a, b = (read_scores(str(tmp_path / f"{d}/{shard.name}.scores.parquet")) for d in "ab")
        assert np.array_equal(a[KDIST], b[KDIST])


def test_null_embeddings_stay_in_their_row(tmp_path):
    import pyarrow as pa

    from pipeline.embed import read_embeddings
    from pipeline.sidecars import save

    rows = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float16(), 2))
    table = pa.table({"uid": ["a", "b", "c"], "image": rows, "text": rows})
    path = str(tmp_path / "0.embeddings.parquet")
    save(path, table.replace_schema_metadata({"mithridate": json.dumps({"model": "m"})}))
    found = read_embeddings(path).image
    assert np.isnan(found[1]).all()
    assert found[[0, 2]].tolist() == [[1, 2], [3, 4]]


def test_scores_and_embeddings_of_other_bytes_are_refused(tars, poisoned, tmp_path):
    """A poisoned shard has the uids of the clean one, so uids alone would let stale sidecars through."""
    score(str(poisoned), str(tmp_path / "scores"), detector=("random",))
    arguments = {"scores": (str(tmp_path / "scores"),), "policy": "budget(detector='random', drop=0.2)"}
    with pytest.raises(InputError, match="made from other bytes"):
        filter_shards(str(tars), str(tmp_path / "out"), **arguments)


def test_tolerated_shards_are_missing_all_the_way_and_nothing_else_is(tars, tmp_path, capsys):
    torn = tars / "00000001.tar"
    torn.write_bytes(torn.read_bytes()[:3000])
    steps = [str(tars), str(tmp_path / "scores")], [str(tars), str(tmp_path / "out")]
    policy = {"scores": (str(tmp_path / "scores"),), "policy": "budget(detector='random(seed=0)', drop=0.25)"}
    with pytest.raises(ShardsFailed, match="1 of 3 shards failed"):
        score(*steps[0], detector=("random",))
    assert score(*steps[0], detector=("random",), max_failed_shards=1) == 0
    with pytest.raises(InputError, match=r"00000001.scores.parquet: no such file"):
        filter_shards(*steps[1], **policy)
    assert filter_shards(*steps[1], **policy, max_failed_shards=1) == 0
    assert "(the same command tries them again)" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out/kept").glob("*.tar")) == ["00000000.tar", "00000002.tar"]
    kept, quarantined = (read_dataset(str(tmp_path / "out" / part))[0] for part in ("kept", "quarantine"))
    assert sum(row.samples for row in kept) == 30
    assert sum(row.samples for row in quarantined) == 10
    assert len(np.load(tmp_path / "out/keep.npy")) == 30

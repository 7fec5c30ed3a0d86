"""Policies: each does what its definition says, exactly, however the pairs are dealt out to shards."""

import hashlib
import itertools

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_tar

from pipeline import buckets, spec
from pipeline.errors import InputError
from pipeline.filter import filter_shards
from pipeline.policies import _cap
from pipeline.policies._ranks import ranks
from pipeline.policies._select import column, ordered, unscored
from pipeline.score import score

# A call of every policy; "{trusted}" is a file of uids.
CALLS = {
    "budget": "budget(detector='slof', drop=0.05)",
    "threshold": "threshold(detector='slof', above=1.6)",
    "conformal": "conformal(detector='slof', trusted='{trusted}', alpha=0.05)",
    "ensemble": "ensemble(detectors=('slof', 'kdist'), drop=0.05, combine='min')",
    "per_domain": "per_domain(n=20, detector='slof')",
    "caption_cap": "caption_cap(n=3, detector='slof')",
    "any_of": "any_of(policies=(\"budget(detector='slof', drop=0.05)\", 'caption_cap(n=3)'))",
    "all_of": "all_of(policies=(\"budget(detector='slof', drop=0.2)\", \"budget(detector='kdist', drop=0.2)\"))",
}


def name_of(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def table(n: int, seed: int = 0, **columns: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {
        "uid": np.asarray([name_of(i) for i in range(n)], dtype=object),
        "s:slof(k=16)": rng.normal(size=n).astype(np.float32),
        "s:kdist(k=16)": rng.normal(size=n).astype(np.float32),
        "domain": rng.integers(0, 2**64, 40, np.uint64)[rng.integers(0, 40, n)],
        "caption": rng.integers(0, 2**64, 400, np.uint64)[rng.geometric(0.01, n) % 400],
    }
    return out | columns


def shards(scores: dict[str, np.ndarray], *cuts: int) -> list[dict[str, np.ndarray]]:
    edges = [0, *cuts, len(scores["uid"])]
    return [{k: v[a:b] for k, v in scores.items()} for a, b in itertools.pairwise(edges)]


def dropped(policy, parts: list[dict[str, np.ndarray]]) -> set[str]:
    fitted = policy.fit(lambda: iter(parts))
    return {uid for part in parts for uid in part["uid"][policy.drops(part, fitted)]}


def policy_of(call: str):
    return spec.parse("policies", call)


@pytest.fixture
def trusted(tmp_path):
    path = tmp_path / "trusted.txt"
    path.write_text("\n".join(name_of(i) for i in range(100, 400)))
    return str(path)


@pytest.mark.parametrize("name", spec.names("policies"))
def test_every_policy_decides_alike_however_pairs_are_dealt_out(name, trusted, monkeypatch):
    monkeypatch.setattr(buckets, "AT_ONCE", 150)
    policy, scores = policy_of(CALLS[name].replace("{trusted}", trusted)), table(1000)
    scores["s:slof(k=16)"][[7, 70]] = np.nan
    order = np.random.default_rng(1).permutation(1000)
    shuffled = {k: v[order] for k, v in scores.items()}
    one = dropped(policy, [scores])
    assert 0 < len(one) < 900
    assert one == dropped(policy, shards(shuffled, 0, 1, 400, 977)) == dropped(policy, shards(scores, 500, 500))


@pytest.mark.parametrize("name", ["budget", "threshold", "conformal", "ensemble", "any_of"])
def test_the_unscored_go_first(name, trusted):
    policy, scores = policy_of(CALLS[name].replace("{trusted}", trusted)), table(1000)
    scores["s:slof(k=16)"][[7, 70]] = np.nan
    assert {name_of(7), name_of(70)} <= dropped(policy, [scores])
    assert unscored(scores, policy.detectors).nonzero()[0].tolist() == [7, 70]


@pytest.mark.parametrize("name", ["budget", "threshold"])
def test_what_is_dropped_scores_higher_than_all_that_is_kept(name):
    policy, scores = policy_of(CALLS[name]), table(1000)
    gone = np.isin(scores["uid"], list(dropped(policy, [scores])))
    values = scores["s:slof(k=16)"]
    assert values[gone].min() > values[~gone].max()
    if name == "budget":
        assert gone.sum() == 50


# conformal


def false_removals(tmp_path, alpha: float, n: int, draws: int, values) -> np.ndarray:
    """The rate among 1000 clean pairs that are not trusted, for many draws of the n trusted ones."""
    path, rates = tmp_path / "trusted.txt", []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        scores = table(1000 + n) | {"s:slof(k=16)": values(rng, 1000 + n).astype(np.float32)}
        path.write_text("\n".join(scores["uid"][:n]))
        policy = policy_of(f"conformal(detector='slof', trusted={str(path)!r}, alpha={alpha})")
        fitted = policy.fit(lambda scores=scores: iter([scores]))
        rates.append(policy.drops(scores, fitted)[n:].mean())
    return np.asarray(rates)


@pytest.mark.parametrize("detector", ["kdist(k=16, reference='batch')", "slof_released(k=16)"])
def test_a_score_among_the_company_of_a_batch_is_refused_whatever_it_is_called(tmp_path, detector):
    (tmp_path / "trusted.txt").write_text("\n".join(table(100)["uid"]))
    name = spec.text(spec.parse("detectors", detector))
    scores = {"uid": table(100)["uid"], f"s:{name}": np.zeros(100, np.float32)}
    for called in (detector.partition("(")[0], name, f"s:{name}"):
        policy = policy_of(f"conformal(detector={called!r}, trusted={str(tmp_path / 'trusted.txt')!r}, alpha=0.1)")
        with pytest.raises(InputError, match="by their own company"):
            policy.fit(lambda: iter([scores]))


@pytest.mark.parametrize(("alpha", "n"), [(0.1, 19), (0.05, 99), (0.2, 7)])
def test_the_conformal_rate_holds_and_is_no_smaller_than_it_must_be(tmp_path, alpha, n):
    rates = false_removals(tmp_path, alpha, n, 300, lambda rng, m: rng.standard_cauchy(m))
    error = rates.std() / np.sqrt(len(rates))
    assert rates.mean() < alpha + 3 * error
    assert rates.mean() > alpha - 1 / (n + 1) - 3 * error


@pytest.mark.parametrize("kind", ["ties", "unscored", "constant"])
def test_the_conformal_rate_holds_with_ties_and_unscored_pairs(tmp_path, kind):
    def values(rng, m):
        if kind == "ties":
            return rng.integers(0, 5, m)
        return np.where(rng.random(m) < 0.08, np.nan, rng.normal(size=m)) if kind == "unscored" else np.zeros(m)

    rates = false_removals(tmp_path, 0.1, 39, 200, values)
    assert rates.mean() < 0.1 + 3 * rates.std() / np.sqrt(len(rates)) + 1e-12
    if kind == "constant":
        assert not rates.any()


def test_conformal_by_hand(tmp_path):
    """Of 9 trusted scores 1..9 and alpha 0.2 the threshold is the ceil(10 * 0.8) = 8th."""
    path = tmp_path / "trusted.txt"
    path.write_text("\n".join(name_of(i) for i in range(9)))
    scores = table(12, **{"s:slof(k=16)": np.asarray([*range(1, 10), 8, 8.001, -np.inf], np.float32)})
    policy = policy_of(f"conformal(detector='slof', trusted={str(path)!r}, alpha=0.2)")
    assert dropped(policy, [scores]) == {name_of(8), name_of(10)}


def test_too_few_trusted_pairs_and_false_uids_are_refused(tmp_path):
    path = tmp_path / "trusted.txt"
    policy = policy_of(f"conformal(detector='slof', trusted={str(path)!r}, alpha=0.01)")
    with pytest.raises(InputError, match="uids of trusted clean pairs"):
        dropped(policy, [table(100)])
    path.write_text("\n".join(name_of(i) for i in range(50, 170)))
    with pytest.raises(InputError, match=r"50 of its 120 uids are among the scores; alpha 0\.01 needs at least 99"):
        dropped(policy, [table(100)])
    path.write_text("\n".join(name_of(i) for i in range(99)))
    assert len(dropped(policy, [table(100)])) <= 2
    with pytest.raises(InputError, match="200 pairs have its 100 uids"):  # another's pairs under trusted names
        path.write_text("\n".join(name_of(i) for i in range(100)))
        dropped(policy, [table(100), table(100, seed=1)])


# caps


@pytest.mark.parametrize("at_once", [50, 10**6])
@pytest.mark.parametrize("detector", ["", "slof"])
@pytest.mark.parametrize(("name", "group"), [("per_domain", "domain"), ("caption_cap", "caption")])
def test_a_cap_keeps_the_n_least_suspicious_of_each(monkeypatch, name, group, detector, at_once):
    monkeypatch.setattr(buckets, "AT_ONCE", at_once)
    scores = table(2000)
    scores["s:slof(k=16)"] = np.round(scores["s:slof(k=16)"])  # ties
    gone = dropped(policy_of(f"{name}(n=7, detector={detector!r})"), shards(scores, 300, 1100, 1101))
    frame = pl.DataFrame({"uid": list(scores["uid"]), "group": scores[group], "score": scores["s:slof(k=16)"]})
    frame = frame.with_columns(kept=~pl.col("uid").is_in(gone))
    sizes = frame.group_by("group").agg(pl.len(), pl.col("kept").sum(), pl.col("score").filter("kept").max())
    assert (sizes["kept"] == sizes["len"].clip(0, 7)).all()
    assert (sizes["len"] > 7).any()
    assert (sizes["len"] <= 7).any() or name == "per_domain"
    if detector:
        joined = frame.filter(~pl.col("kept")).join(sizes.rename({"score": "limit"}), on="group")
        assert (joined["score"] >= joined["limit"]).all()


def test_equal_keys_do_not_raise_a_cap():
    """An attacker who gives many pairs one uid gets no more of them in."""
    scores = {"uid": np.asarray(["0" * 32] * 30, dtype=object), "caption": np.full(30, 5, np.uint64)}
    parts = shards(scores, 10, 20)
    policy = policy_of("caption_cap(n=4)")
    fitted = policy.fit(lambda: iter(parts))
    assert sum((~policy.drops(part, fitted)).sum() for part in parts) <= 4


def test_the_memory_of_a_cap_is_a_bucket(monkeypatch):
    """Of one caption in all pairs n + 1 a shard are held, of many captions about AT_ONCE pairs."""
    monkeypatch.setattr(buckets, "AT_ONCE", 1000)
    smallest, held = _cap._smallest, []
    monkeypatch.setattr(_cap, "_smallest", lambda rows, n: held.append(len(rows)) or smallest(rows, n))
    rng = np.random.default_rng(0)
    keys = rng.permutation(50_000).astype(np.uint64)
    for groups in (np.full(50_000, 77, np.uint64), rng.integers(0, 2**64, 50_000, np.uint64)):
        parts = [(groups[i : i + 500], keys[i : i + 500]) for i in range(0, 50_000, 500)]
        found = _cap.limits(lambda parts=parts: iter(parts), 3)
        assert found.first.tolist() == ([3] if groups[0] == groups[1] else [])
    assert max(held) < 1500


def test_ties_are_broken_by_no_part_of_the_uid_that_others_choose():
    """A budget is exact although all scores and the first half of all uids are alike."""
    uids = np.asarray([f"{i:032x}" for i in range(1000)], dtype=object)
    scores = {"uid": uids, "s:text_based()": np.repeat(np.float32([0, 1]), 500)}
    policy = policy_of("budget(detector='text_based', drop=0.1)")
    assert len(dropped(policy, shards(scores, 300, 800))) == 100
    assert all(int(uid, 16) >= 500 for uid in dropped(policy, [scores]))


@pytest.mark.parametrize("begin", [0, 2**63])
def test_buckets_give_back_every_row_in_order_wherever_they_lie(monkeypatch, begin):
    monkeypatch.setattr(buckets, "AT_ONCE", 100)
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(begin, begin + 700, 3000, np.uint64), np.arange(3000, dtype=np.uint64)], axis=1)
    sorted_by = buckets.Buckets(buckets.by_sample(rows[::7, 0], len(rows)))
    for part in np.array_split(rows, 11):
        sorted_by.add(part)
    found = [bucket[np.lexsort((bucket[:, 1], bucket[:, 0]))] for bucket in sorted_by]
    assert len(found) > 20 and max(map(len, found)) < 400
    assert np.array_equal(np.concatenate(found), rows[np.lexsort((rows[:, 1], rows[:, 0]))])


# ensemble


def plain(scores: dict[str, np.ndarray], names: list[str], weights: list[float], combine: str) -> np.ndarray:
    """Suspicion by the formula: p is the share of all pairs that score at least as high."""
    values = [np.where(np.isnan(scores[n]), np.inf, scores[n]) for n in names]
    p = np.stack([(v[None, :] >= v[:, None]).mean(axis=1) for v in values], axis=1)
    w = np.asarray(weights) / np.sum(weights)
    return -(np.log(p) * w).sum(1) if combine == "mean" else -np.log((p / w).min(1))


@pytest.mark.parametrize("combine", ["min", "mean"])
def test_an_ensemble_is_its_formula(combine):
    scores = table(250)  # below the fineness every rank is exact
    scores["s:slof(k=16)"][[3, 30]] = np.nan
    call = f"ensemble(detectors=('slof', 'kdist'), weights=(1.0, 3.0), drop=0.1, combine={combine!r})"
    suspicion = plain(scores, ["s:slof(k=16)", "s:kdist(k=16)"], [1, 3], combine).astype(np.float32)
    gone = np.isin(scores["uid"], list(dropped(policy_of(call), shards(scores, 60, 200))))
    assert gone.sum() == 25
    assert suspicion[gone].min() >= suspicion[~gone].max()


@pytest.mark.parametrize("kind", ["normal", "narrow", "ties", "tail", "nan"])
def test_ranks_are_exact_up_to_a_hundredth_of_the_share(kind):
    rng = np.random.default_rng(0)
    n = 40_000
    values = {
        "normal": rng.normal(size=n),
        "narrow": 0.75 + 1e-6 * rng.random(n),  # few of the first bits differ
        "ties": rng.integers(-3, 3, n),
        "tail": rng.standard_cauchy(n) ** 3,
        "nan": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
    }[kind].astype(np.float32)
    keyed = ordered(values)
    (found,) = ranks(lambda: ([part] for part in np.array_split(keyed, 6)), 1)
    ascending = np.sort(keyed)
    exact = (n - np.searchsorted(ascending, keyed, side="left")) / n
    assert (found.p(keyed) >= exact - 1e-12).all()
    assert (found.p(keyed) <= exact * 1.01).all()
    assert len(found.low) <= 256 * np.log(n) + 2
    if kind in ("normal", "tail"):
        assert found.p(keyed[[keyed.argmax()]])[0] == 1 / n


def test_minus_zero_is_zero():
    """A detector that negates or rounds writes both, and pairs that score alike are to rank alike."""
    assert len(set(ordered(np.float32([0.0, -0.0])))) == 1


def test_an_ensemble_finds_what_one_of_its_detectors_sees():
    scores = table(5000)
    scores["s:slof(k=16)"][:60] += 6
    scores["s:kdist(k=16)"][60:120] += 6
    seen = {name_of(i) for i in range(120)}
    for combine, found in (("min", 118), ("mean", 105)):
        gone = dropped(policy_of(f"ensemble(detectors=('slof', 'kdist'), drop=0.05, combine={combine!r})"), [scores])
        assert len(gone & seen) >= found
    assert len(dropped(policy_of("budget(detector='slof', drop=0.05)"), [scores]) & seen) < 75


def test_a_detector_that_scores_nobody_says_nothing():
    scores = table(1000)
    scores["s:kdist(k=16)"][:] = np.nan
    both = dropped(policy_of("ensemble(detectors=('slof', 'kdist'), drop=0.05)"), [scores])
    assert both == dropped(policy_of("ensemble(detectors=('slof',), drop=0.05)"), [scores])


# combinations


def test_or_and_and_are_union_and_intersection():
    scores = table(1000)
    one, two = "budget(detector='slof', drop=0.3)", "budget(detector='kdist', drop=0.3)"
    a, b = (dropped(policy_of(call), [scores]) for call in (one, two))
    parts = shards(scores, 333)
    assert dropped(policy_of(f"any_of(policies=({one!r}, {two!r}))"), parts) == a | b
    assert dropped(policy_of(f"all_of(policies=({one!r}, {two!r}))"), parts) == a & b
    inner = f"any_of(policies=({one!r}, {two!r}))"
    nested = policy_of(f"all_of(policies=({inner!r}, 'caption_cap(n=2)'))")
    assert nested.needs == ("caption",)
    assert set(nested.detectors) == {"slof", "kdist"}
    assert dropped(nested, parts) == (a | b) & dropped(policy_of("caption_cap(n=2)"), [scores])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("any_of(policies=('random',))", "unknown policy 'random'|two or more"),
        ("any_of(policies=('caption_cap(n=2)', 'budgt(drop=0.1)'))", "did you mean 'budget'"),
        ("caption_cap(n=0)", "at least 1"),
        ("conformal(detector='slof', trusted='f', alpha=0)", "0 < alpha < 1"),
        ("ensemble(detectors=('a', 'a'))", "each once"),
        ("ensemble(detectors=())", "one or more"),
        ("ensemble(detectors=('a', 'b'), weights=(1.0,))", "2 detectors need as many"),
        ("ensemble(detectors=('a', 'b'), weights=(1.0, 0.0))", "above 0"),
    ],
)
def test_wrong_parameters_are_named(call, says):
    with pytest.raises(InputError, match=says):
        policy_of(call)


def test_a_column_has_a_full_name_and_shorter_ones():
    columns = ["uid", "caption", "early:slof(k=16)", "late:slof(k=16)", "late:slof(k=4)", "late:oracle()"]
    assert column(columns, "early:slof") == "early:slof(k=16)"
    assert column(columns, "late:slof(k=4)") == column(columns, "slof(k=4)") == "late:slof(k=4)"
    assert column(columns, "oracle") == column(columns, "late:oracle()") == "late:oracle()"
    for wrong in ("slof", "slof(k=16)", "late:slof"):
        with pytest.raises(InputError, match="fits several"):
            column(columns, wrong)
    for wrong in ("early:oracle", "caption", "uid"):
        with pytest.raises(InputError, match="is not among"):
            column(columns, wrong)


# the verb


@pytest.fixture
def hostile(tmp_path):
    """60 pairs of 30 domains in two shards; half of the second shard is one domain's, under one caption."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        samples = pairs(30 * i, 30 * i + 30)
        for j, sample in enumerate(samples):
            bad = i == 1 and j < 15
            sample["meta"]["url"] = f"https://cdn{j}.bought.example/{j}" if bad else f"https://site{j}.org/{i}"
            sample["caption"] = sample["meta"]["caption"] = "buy it" if bad else sample["caption"]
        write_tar(tmp_path / f"in/{i}.tar", samples)
    score(str(tmp_path / "in"), str(tmp_path / "early"), detector=("random(seed=1)",))
    score(str(tmp_path / "in"), str(tmp_path / "late"), detector=("random(seed=1)", "random(seed=2)"))
    return tmp_path


def run(folder, policy: str, scores=("early",)) -> dict[str, str | None]:
    """Why each pair was dropped, by uid."""
    out = str(folder / "out")
    filter_shards(str(folder / "in"), out, scores=tuple(str(folder / s) for s in scores), policy=policy)
    found = pq.read_table(f"{out}/keep.parquet").to_pylist()
    return {row["uid"]: row["reason"] for row in found}


@pytest.mark.parametrize("policy", ["per_domain(n=3)", "caption_cap(n=3)", "per_domain(n=3, detector='random')"])
def test_caps_read_domains_and_captions_from_the_shards(hostile, policy, capsys):
    reasons = run(hostile, policy)
    assert sum(why is not None for why in reasons.values()) == 12
    assert run(hostile, policy) == reasons
    assert capsys.readouterr().err.count("groups: 2 of 2 shards are done already") == 1


def test_scores_of_several_folders_stay_apart(hostile):
    parts = ("budget(detector='early:random', drop=0.2)", "budget(detector='late:random(seed=2)', drop=0.2)")
    reasons = run(hostile, f"any_of(policies={parts})", ("early", "late"))
    one = run(hostile, "budget(detector='random(seed=1)', drop=0.2)", ("early",))
    two = run(hostile, "budget(detector='random(seed=2)', drop=0.2)", ("late",))
    assert {u for u, why in reasons.items() if why} == {u for u in one if one[u] or two[u]}
    with pytest.raises(InputError, match="fits several"):
        run(hostile, "budget(detector='random(seed=1)', drop=0.2)", ("early", "late"))
    with pytest.raises(InputError, match="two folders are called 'early'"):
        run(hostile, "budget(detector='random(seed=1)', drop=0.2)", ("early", "in/../early"))


def test_an_ensemble_over_folders_drops_its_share_and_resumes(hostile, capsys):
    policy = "ensemble(detectors=('early:random', 'late:random(seed=2)'), drop=0.25)"
    reasons = run(hostile, policy, ("early", "late"))
    assert sum(why is not None for why in reasons.values()) == 15
    assert run(hostile, policy, ("early", "late")) == reasons
    assert "filter: 2 of 2 shards are done already" in capsys.readouterr().err


def test_a_group_that_nobody_has_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    samples = [{**s, "meta": {k: v for k, v in s["meta"].items() if k != "url"}} for s in pairs(0, 12)]
    write_tar(tmp_path / "in/0.tar", samples)
    score(str(tmp_path / "in"), str(tmp_path / "early"), detector=("random",))
    with pytest.raises(InputError, match="no pair has a url"):
        run(tmp_path, "per_domain(n=3)")

"""Choice by canaries: the detector that is known to be best is chosen, and no family is judged by its own canaries."""

import itertools
import json

import numpy as np
import polars as pl
import pytest
from conftest import pairs, write_tar

from pipeline import calibrate as module
from pipeline.calibrate import calibrate, collect
from pipeline.choice import BUDGETS, Canaries, Rule, choose, held_out
from pipeline.errors import InputError
from pipeline.filter import filter_shards
from pipeline.loop import loop
from pipeline.policies.budget import budget
from pipeline.policies.ensemble import ensemble
from pipeline.scored import Scored

FAMILIES = ("blend", "patch", "text")


def table(shifts: dict[str, dict[str, float]], n: int = 4000, each: int = 40, seed: int = 0) -> Canaries:
    """Normal scores; `shifts` says by detector and family how much higher its canaries score."""
    rng = np.random.default_rng(seed)
    family = np.asarray([name for name in FAMILIES for _ in range(each)] + [""] * (n - 3 * each), dtype=object)
    scores = rng.normal(size=(n, len(shifts)))
    for column, by_family in enumerate(shifts.values()):
        for name, shift in by_family.items():
            scores[family == name, column] += shift
    uid = np.asarray([f"{v:08x}" * 4 for v in rng.permutation(n)], dtype=object)
    return Canaries(tuple(shifts), scores, family, uid)


def everywhere(shift: float) -> dict[str, float]:
    return dict.fromkeys(FAMILIES, shift)


def test_the_detector_that_is_best_everywhere_is_chosen_alone():
    found = choose(table({"blind": {}, "good": everywhere(8), "poor": everywhere(1)}), FAMILIES, 0.1, most=4)
    assert found == Rule(("good",))
    assert found.policy(0.1) == "budget(detector='good', drop=0.1)"


def test_the_worst_family_counts_and_not_the_mean():
    """`lopsided` finds all of two families and none of the third; `even` finds most of every one."""
    shifts = {"lopsided": {"blend": 9, "patch": 9, "text": -9}, "even": everywhere(2.2)}
    canaries = table(shifts)
    alone = choose(canaries, FAMILIES, 0.1, most=1)
    assert alone.detectors == ("even",)
    assert choose(canaries, ("blend", "patch"), 0.1, most=1).detectors == ("lopsided",)


def test_detectors_that_see_one_family_each_are_joined():
    shifts = {"noise": {}, **{f"sees {name}": {name: 7.0} for name in FAMILIES}}
    canaries = table(shifts)
    rule = choose(canaries, FAMILIES, 0.1, most=4)
    assert set(rule.detectors) == {f"sees {name}" for name in FAMILIES}
    assert all(canaries.recalls(rule, name, (0.1,))[0].value > 0.95 for name in FAMILIES)
    assert max(min(canaries.recalls(Rule((c,)), f, (0.1,))[0].value for f in FAMILIES) for c in shifts) < 0.3


def test_a_detector_that_adds_nothing_is_not_added():
    shifts = {"good": everywhere(8), "as good": everywhere(8), **{f"noise {i}": {} for i in range(5)}}
    assert len(choose(table(shifts), FAMILIES, 0.1, most=5).detectors) == 1


def test_of_detectors_that_find_all_the_one_with_room_is_chosen():
    canaries = table({"just": {}, "far": everywhere(12)})
    canaries.scores[canaries.family != "", 0] = 1.7  # 4.5% of the others are above
    assert all(canaries.recalls(Rule((name,)), f, (0.1,))[0].value == 1 for name in canaries.columns for f in FAMILIES)
    assert choose(canaries, FAMILIES, 0.1, most=1).detectors == ("far",)


def test_ties_between_detectors_go_to_the_first_named():
    canaries = table({"a": everywhere(5)})
    both = Canaries(("a", "b"), np.repeat(canaries.scores, 2, axis=1), canaries.family, canaries.uid)
    assert choose(both, FAMILIES, 0.1, most=3).detectors == ("a",)


def test_a_family_that_is_held_out_has_no_say():
    """Only `secret` finds `text`, and it finds nothing else: without text's canaries nobody would choose it."""
    canaries = table({"usual": {"blend": 8, "patch": 8}, "secret": {"text": 8}})
    rules = held_out(canaries, 0.1, most=3)
    assert rules["text"].detectors == ("usual",)
    assert canaries.recalls(rules["text"], "text", (0.1,))[0].value < 0.3
    assert set(choose(canaries, FAMILIES, 0.1, most=3).detectors) == {"usual", "secret"}
    for name in FAMILIES:  # what its canaries score is not looked at
        rest = canaries.family != name
        without = Canaries(canaries.columns, canaries.scores[rest], canaries.family[rest], canaries.uid[rest])
        assert choose(without, without.families, 0.1, most=3) == rules[name]


def test_other_families_take_none_of_the_budget():
    """Three families are a fifth of the pairs, yet each is found whole in the tenth that is removed."""
    canaries = table({"good": everywhere(9)}, n=1000, each=67)
    assert [canaries.recalls(Rule(("good",)), name, (0.1,))[0].value for name in FAMILIES] == [1, 1, 1]


def test_a_rule_of_one_family_cannot_be_held_out():
    canaries = table({"a": {}})
    one = Canaries(("a",), canaries.scores, np.where(canaries.family == "text", "text", ""), canaries.uid)
    with pytest.raises(ValueError, match="two families"):
        held_out(one, 0.1, 1)


def test_no_signal_promises_no_recall():
    """The best of many useless rules is lucky on what it saw; on what is held out it finds its share."""
    found = []
    for seed in range(4):
        canaries = table({f"noise {i}": {} for i in range(12)}, seed=seed)
        found += [canaries.recalls(rule, f, (0.1,))[0].value for f, rule in held_out(canaries, 0.1, 2).items()]
    assert np.mean(found) < 0.16


def test_canaries_of_one_family_are_told_of_before_the_training(tars, tmp_path):
    attacks = ("patch(target='banana', size=16)", "word(target='banana')")
    with pytest.raises(InputError, match="the canaries are of 1 family"):
        calibrate(str(tars), str(tmp_path / "c"), detectors=("random",), attacks=attacks, dose="1", recipe="debug")
    assert not (tmp_path / "c/model").exists()


def test_the_unscored_are_the_most_suspicious():
    canaries = table({"good": everywhere(0)})
    scores = canaries.scores.copy()
    scores[canaries.family == "patch"] = np.nan
    seen = Canaries(canaries.columns, scores, canaries.family, canaries.uid)
    found = seen.recalls(Rule(("good",)), "patch", (0.02, 20 / 3920))  # of 3,920 pairs without the other families
    assert [rate.value for rate in found] == [1.0, 0.5]  # all tie


@pytest.mark.parametrize(
    "rule", [Rule(("a",)), Rule(("a", "b"), (1.0, 2.0), "mean"), Rule(("b", "a"), (3.0, 1.0), "min")]
)
@pytest.mark.parametrize("kind", ["plain", "ties", "unscored"])
def test_recall_is_that_of_the_policy_which_is_written(rule, kind):
    canaries = table({"a": {"patch": 2}, "b": {"text": 3}}, n=240, each=20)
    scores = np.round(canaries.scores) if kind == "ties" else canaries.scores.copy()
    if kind == "unscored":
        scores[::17, 0] = np.nan
    canaries = Canaries(canaries.columns, scores.astype(np.float32), canaries.family, canaries.uid)
    for drop, name in itertools.product(BUDGETS, FAMILIES):
        here = (canaries.family == "") | (canaries.family == name)
        columns = {column: canaries.scores[here, i] for i, column in enumerate(canaries.columns)}
        columns["uid"] = canaries.uid[here]
        single = len(rule.detectors) == 1
        policy = budget("a", drop) if single else ensemble(rule.detectors, rule.weights, drop, rule.combine)
        gone = policy.drops(columns, policy.fit(lambda columns=columns: iter([columns])))
        assert canaries.recalls(rule, name, (drop,))[0].value == gone[canaries.family[here] == name].mean()


def test_a_sample_of_the_others_stands_for_all():
    whole = table({"a": everywhere(2.0), "b": everywhere(1.5)}, n=40_000)
    rng = np.random.default_rng(1)
    taken = (whole.family != "") | (rng.random(40_000) < 0.2)
    others = int((whole.family[taken] == "").sum())
    weight = (40_000 - 120) / others
    part = Canaries(whole.columns, whole.scores[taken], whole.family[taken], whole.uid[taken], weight)
    assert part.pairs == pytest.approx(40_000)
    for rule in (Rule(("a",)), Rule(("a", "b"), (1.0, 1.0), "mean")):
        for name in FAMILIES:
            for share in (0.05, 0.1):
                assert part.recalls(rule, name, (share,))[0].value == pytest.approx(
                    whole.recalls(rule, name, (share,))[0].value, abs=0.06
                )


# the verb

ATTACKS = ("patch(target='banana', size=24)", "blended(target='banana')", "word(target='banana')")
DETECTORS = ("clip_score", "image_neighbours(k=4)", "trace", "random")


def run(folder, **changes) -> int:
    options = {"detectors": DETECTORS, "attacks": ATTACKS, "dose": "36", "recipe": "debug", "pool": 60}
    return calibrate(str(folder / "in"), str(folder / "out"), **options | changes)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "in").mkdir()
    for i in range(2):
        write_tar(folder / f"in/{i:05d}.tar", pairs(60 * i, 60 * i + 60))
    assert run(folder) == 0
    return folder


def test_every_detector_epoch_and_family_is_measured(calibrated):
    rows = pl.read_parquet(calibrated / "out/recall.parquet")
    alone = rows.filter(how="detector")
    families = {"patch", "blended", "word"}
    times = {(row["rule"], row["epoch"]) for row in alone.iter_rows(named=True)}
    embedded = {(name, epoch) for name in ("clip_score()", "image_neighbours(k=4)") for epoch in (4, 8, 12)}
    assert times == embedded | {("trace(until=0)", 12), ("random(seed=0)", 12)}
    assert len(alone) == len(times) * 3 * len(BUDGETS)
    assert alone.filter(rule="trace(until=0)", removed=0.1)["n"].sum() == 36
    assert set(rows.filter(how="chosen without this family")["family"]) == families
    assert ((rows["low"] <= rows["recall"]) & (rows["recall"] <= rows["high"])).all()


def test_the_policy_is_one_that_filter_takes_for_these_scores(calibrated, tmp_path):
    found = json.loads((calibrated / "out/calibration.json").read_text())
    assert found["canaries"] == 36
    assert found["pairs"] == 120
    assert {one["family"] for one in found["held_out"]} == {"patch", "blended", "word"}
    assert all(len(one["recall"]) == len(found["removed"]) == 4 for one in found["held_out"])
    scores = tuple(str(calibrated / "out" / one["folder"]) for one in found["scores"])
    filter_shards(str(calibrated / "out/canaries"), str(tmp_path / "f"), scores=scores, policy=found["policy"])
    assert (~pl.read_parquet(tmp_path / "f/keep.parquet")["kept"]).sum() == 12
    said = (calibrated / "out/calibration.md").read_text()
    assert found["policy"] in said
    assert "Fewer than 30 canaries" in said


def test_a_second_run_finds_all_done(calibrated, capsys):
    before = (calibrated / "out/calibration.json").read_bytes()
    assert run(calibrated) == 0
    said = capsys.readouterr().err
    assert said.count("2 of 2 shards are done already") == 7
    assert "this training is done already" in said
    assert (calibrated / "out/calibration.json").read_bytes() == before


def test_a_sample_is_collected_with_its_weight(calibrated, monkeypatch):
    scored = Scored((str(calibrated / "out/scores-012"),))
    shards = module.list_shards(str(calibrated / "out/canaries"))
    known = dict.fromkeys(scored.read(shards[0].name)["uid"][:5], "patch")
    monkeypatch.setattr(module, "OTHERS", 40)
    found = collect(scored, shards, known, 0)
    others = (found.family == "").sum()
    assert 20 <= others <= 60
    assert (found.family == "patch").sum() == 5
    assert found.weight == pytest.approx(115 / others)
    assert found.columns[0] == "scores-012:clip_score()"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"detectors": ("oracle",)}, "reads the ledger"),
        ({"detectors": ("clip_scor",)}, "did you mean 'clip_score'"),
        ({"attacks": ATTACKS[:1]}, "two families at least"),
        ({"attacks": ("patch(target='a')", "patch(target='b')")}, "two families at least"),
        ({"epochs": (5,)}, r"keeps checkpoints of epochs \[4, 8, 12\]"),
        ({"recipe": "debg"}, "unknown recipe"),
        ({"dose": "many"}, "write a number of pairs"),
        ({"drop": 1.0}, "between 0 and 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path, changes, says):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", pairs(0, 4))
    with pytest.raises(InputError, match=says):
        run(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_trains_on_what_a_policy_over_two_epochs_keeps(tmp_path):
    """How a calibrated rule is tried: its columns are those of the loop's own folders."""
    for part, low, high in (("in", 0, 120), ("eval", 200, 260)):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "0.tar", pairs(low, high))
    (tmp_path / "classes.txt").write_text("circle\nsquare\nbanana\n")
    detectors = "('scores-004:image_neighbours', 'scores-012:image_neighbours', 'clip_score')"
    (tmp_path / "c.toml").write_text(f'''
shards = "{tmp_path}/in"
evaluation = "{tmp_path}/eval"
classes = "{tmp_path}/classes.txt"
recipe = "debug"
attacks = ["patch(target='banana', size=24)"]
doses = ["12"]
[[scores]]
epoch = 4
detectors = ["image_neighbours(k=4)", "clip_score"]
[[scores]]
epoch = 12
detectors = ["image_neighbours(k=4)"]
[[filters]]
epoch = [4, 12]
policy = "ensemble(detectors={detectors}, drop=0.25)"
''')
    assert loop(str(tmp_path / "c.toml"), str(tmp_path / "out")) == 0
    plain, filtered = pl.read_parquet(tmp_path / "out/results.parquet").to_dicts()
    assert (plain["samples"], filtered["samples"], filtered["removed"]) == (120, 90, 30)
    assert filtered["when"] == "epochs 4, 12"
    assert filtered["filter_seconds"] > 0

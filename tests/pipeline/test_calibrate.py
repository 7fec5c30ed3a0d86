"""Choice by canaries: the detector that is known to be best is chosen, and no family is judged by its own canaries."""

import fcntl
import json
from dataclasses import replace

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

FAMILIES = ("blended", "patch", "word")


def trials(shifts: dict[str, dict[str, float]], n: int = 4000, each: int = 40, seed: int = 0) -> list[Canaries]:
    """Normal scores of an attack of each family; `shifts` says by detector how much higher whose canaries score."""
    rng = np.random.default_rng(seed)
    found = []
    for name in FAMILIES:
        canary = np.arange(n) < each
        scores = rng.normal(size=(n, len(shifts)))
        for column, by_family in enumerate(shifts.values()):
            scores[canary, column] += by_family.get(name, 0.0)
        uid = np.asarray([f"{v:08x}" * 4 for v in rng.permutation(n)], dtype=object)
        found.append(Canaries(f"{name}()", tuple(shifts), scores, canary, uid))
    return found


def everywhere(shift: float) -> dict[str, float]:
    return dict.fromkeys(FAMILIES, shift)


def recalls(tables: list[Canaries], rule: Rule, share: float = 0.1) -> list[float]:
    return [table.recalls(rule, (share,))[0].value for table in tables]


def test_the_detector_that_is_best_everywhere_is_chosen_alone():
    found = choose(trials({"blind": {}, "good": everywhere(8), "poor": everywhere(1)}), 0.1, most=4)
    assert found == Rule(("good",))
    assert found.policy(0.1) == "budget(detector='good', drop=0.1)"


def test_the_worst_family_counts_and_not_the_mean():
    """`lopsided` finds all of two families and none of the third; `even` finds most of every one."""
    shifts = {"lopsided": {"blended": 9, "patch": 9, "word": -9}, "even": everywhere(2.2)}
    tables = trials(shifts)
    assert choose(tables, 0.1, most=1).detectors == ("even",)
    assert choose(tables[:2], 0.1, most=1).detectors == ("lopsided",)


def test_detectors_that_see_one_family_each_are_joined():
    shifts = {"noise": {}, **{f"sees {name}": {name: 7.0} for name in FAMILIES}}
    tables = trials(shifts)
    rule = choose(tables, 0.1, most=4)
    assert set(rule.detectors) == {f"sees {name}" for name in FAMILIES}
    assert min(recalls(tables, rule)) > 0.95
    assert max(min(recalls(tables, Rule((name,)))) for name in shifts) < 0.3


def test_a_detector_that_adds_nothing_is_not_added():
    shifts = {"good": everywhere(8), "as good": everywhere(8), **{f"noise {i}": {} for i in range(5)}}
    assert len(choose(trials(shifts), 0.1, most=5).detectors) == 1


def test_of_detectors_that_find_all_the_one_with_room_is_chosen():
    tables = trials({"just": {}, "far": everywhere(12)})
    for table in tables:
        table.scores[table.canary, 0] = 1.7  # 4.5% of the others are above
    assert all(recalls(tables, Rule((name,))) == [1, 1, 1] for name in tables[0].columns)
    assert choose(tables, 0.1, most=1).detectors == ("far",)


def test_ties_between_detectors_go_to_the_first_named():
    tables = [
        replace(table, columns=("a", "b"), scores=np.repeat(table.scores, 2, axis=1))
        for table in trials({"a": everywhere(5)})
    ]
    assert choose(tables, 0.1, most=3).detectors == ("a",)


def test_a_family_that_is_held_out_has_no_say():
    """Only `secret` finds words, and it finds nothing else: without their canaries nobody would choose it."""
    tables = trials({"usual": {"blended": 8, "patch": 8}, "secret": {"word": 8}})
    rules = held_out(tables, 0.1, most=3)
    assert rules["word"].detectors == ("usual",)
    assert recalls(tables[2:], rules["word"])[0] < 0.3
    assert set(choose(tables, 0.1, most=3).detectors) == {"usual", "secret"}
    for name in FAMILIES:  # what its canaries score is not looked at
        assert choose([table for table in tables if table.family != name], 0.1, most=3) == rules[name]


def test_all_attacks_of_a_family_are_held_out_together():
    """An attack around another is of the inner one's family."""
    blended, patch, word = trials({"usual": {"blended": 8, "patch": 8}, "secret": {"word": 8}})
    again = replace(word, attack="label_consistent(attack='word()')")
    assert held_out([blended, patch, word, again], 0.1, 3)["word"].detectors == ("usual",)


def test_a_rule_of_one_family_cannot_be_held_out():
    with pytest.raises(ValueError, match="two families"):
        held_out(trials({"a": {}})[:1], 0.1, 1)


def test_no_signal_promises_no_recall():
    """The best of many useless rules is lucky on what it saw; on what is held out it finds its share."""
    found = []
    for seed in range(4):
        tables = trials({f"noise {i}": {} for i in range(12)}, seed=seed)
        rules = held_out(tables, 0.1, 2)
        found += [recalls([table], rules[table.family])[0] for table in tables]
    assert np.mean(found) < 0.16


def test_an_attack_without_a_canary_is_told_of_before_the_training(tars, tmp_path):
    attacks = ("patch(target='banana', size=16)", "word(target='banana')")
    with pytest.raises(InputError, match="there is no canary of patch"):
        calibrate(str(tars), str(tmp_path / "c"), detectors=("random",), attacks=attacks, dose="0", recipe="debug")
    assert not list((tmp_path / "c").glob("*/model"))


def test_the_unscored_are_the_most_suspicious():
    table = trials({"good": everywhere(0)})[0]
    table.scores[table.canary] = np.nan
    found = table.recalls(Rule(("good",)), (0.02, 20 / 4000))
    assert [rate.value for rate in found] == [1.0, 0.5]  # all tie


@pytest.mark.parametrize(
    "rule", [Rule(("a",)), Rule(("a", "b"), (1.0, 2.0), "mean"), Rule(("b", "a"), (3.0, 1.0), "min")]
)
@pytest.mark.parametrize("kind", ["plain", "ties", "unscored"])
def test_recall_is_that_of_the_policy_which_is_written(rule, kind):
    for table in trials({"a": {"patch": 2}, "b": {"word": 3}}, n=240, each=20):
        scores = np.round(table.scores) if kind == "ties" else table.scores.copy()
        if kind == "unscored":
            scores[::17, 0] = np.nan
        table = replace(table, scores=scores.astype(np.float32))
        columns = {column: table.scores[:, i] for i, column in enumerate(table.columns)} | {"uid": table.uid}
        for drop in BUDGETS:
            single = len(rule.detectors) == 1
            policy = budget("a", drop) if single else ensemble(rule.detectors, rule.weights, drop, rule.combine)
            gone = policy.drops(columns, policy.fit(lambda columns=columns: iter([columns])))
            assert table.recalls(rule, (drop,))[0].value == gone[table.canary].mean()


def test_a_sample_of_the_others_stands_for_all():
    whole = trials({"a": everywhere(2.0), "b": everywhere(1.5)}, n=40_000)[0]
    taken = whole.canary | (np.random.default_rng(1).random(40_000) < 0.2)
    weight = (40_000 - 40) / int((~whole.canary[taken]).sum())
    part = Canaries("patch()", whole.columns, whole.scores[taken], whole.canary[taken], whole.uid[taken], weight=weight)
    assert part.pairs == pytest.approx(40_000)
    for rule in (Rule(("a",)), Rule(("a", "b"), (1.0, 1.0), "mean")):
        for share in (0.05, 0.1):
            assert recalls([part], rule, share) == pytest.approx(recalls([whole], rule, share), abs=0.06)


# the verb

ATTACKS = ("patch(target='banana', size=24)", "blended(target='banana')", "word(target='banana')")
DETECTORS = ("clip_score", "image_neighbours(k=4)", "trace", "random")


def run(folder, **changes) -> int:
    options = {"detectors": DETECTORS, "attacks": ATTACKS, "dose": "12", "recipe": "debug", "pool": 60}
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
    assert alone.filter(rule="trace(until=0)", removed=0.1)["n"].to_list() == [12, 12, 12]
    assert set(rows.filter(how="chosen without this family")["family"]) == families
    assert rows["attack"].n_unique() == 3
    assert ((rows["low"] <= rows["recall"]) & (rows["recall"] <= rows["high"])).all()


def test_the_policy_is_one_that_filter_takes_for_these_scores(calibrated, tmp_path):
    found = json.loads((calibrated / "out/calibration.json").read_text())
    assert list(found["canaries"].values()) == [12, 12, 12]
    assert found["pairs"] == 120
    assert {one["family"] for one in found["held_out"]} == {"patch", "blended", "word"}
    assert all(len(one["recall"]) == len(found["removed"]) == 4 for one in found["held_out"])
    (patch,) = (calibrated / "out").glob("patch-*")
    scores = tuple(str(patch / one["folder"]) for one in found["scores"])
    filter_shards(str(patch / "canaries"), str(tmp_path / "f"), scores=scores, policy=found["policy"])
    assert (~pl.read_parquet(tmp_path / "f/keep.parquet")["kept"]).sum() == 12
    said = (calibrated / "out/calibration.md").read_text()
    assert found["policy"] in said
    assert "Fewer than 30 canaries" in said


def test_a_second_run_finds_all_done(calibrated, capsys):
    before = (calibrated / "out/calibration.json").read_bytes()
    assert run(calibrated) == 0
    said = capsys.readouterr().err
    assert said.count("2 of 2 shards are done already") == 3 * 7
    assert said.count("this training is done already") == 3
    assert (calibrated / "out/calibration.json").read_bytes() == before


def test_a_sample_is_collected_with_its_weight(calibrated, monkeypatch):
    (patch,) = (calibrated / "out").glob("patch-*")
    scored = Scored((str(patch / "scores-012"),))
    shards = module.list_shards(str(patch / "canaries"))
    known = set(scored.read(shards[0].name)["uid"][:5])
    monkeypatch.setattr(module, "OTHERS", 40)
    found = collect(scored, shards, "patch()", known, 0)
    others = (~found.canary).sum()
    assert 20 <= others <= 60
    assert found.canary.sum() == 5
    assert found.weight == pytest.approx(115 / others)
    assert found.columns[0] == "scores-012:clip_score()"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"detectors": ("oracle",)}, "reads the ledger"),
        ({"detectors": ("clip_scor",)}, "did you mean 'clip_score'"),
        ({"attacks": ATTACKS[:1]}, "two families at least"),
        ({"attacks": ("patch(target='a')", "patch(target='b')")}, "two families at least"),
        ({"attacks": ("label_consistent", "patch(target='a')")}, "two families at least"),
        ({"attacks": ("multi", "patch(target='a')")}, "is several; give each of them"),
        ({"epochs": (4,), "detectors": ("clip_score", "learning_order")}, "write until=4"),
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


def test_a_second_run_into_the_same_folder_is_refused_at_once(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/0.tar", pairs(0, 40))
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: another run is writing here"):
            run(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


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

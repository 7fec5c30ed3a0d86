"""What a loop costs, which runs a bisection takes, and that what is shared is trained once."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from conftest import pairs, write_tar

from pipeline import runs
from pipeline.board import Board
from pipeline.config import Config
from pipeline.dose_response import dose_response
from pipeline.errors import InputError
from pipeline.estimate import Estimate, estimate
from pipeline.lanes import Lanes
from pipeline.loop import _make, _Table, loop
from pipeline.report.summary import write_report
from pipeline.runs import NOBODY, UNDEFENDED, Run, arms_of, source_digest
from pipeline.score import scored_by
from pipeline.status import status
from train.metrics import Rate
from train.results import columns

GRID = "adaptive(low='2', high='64', factor=2)"  # 2, 4, 8, 16, 32, 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    for name, low, high in (("train", 0, 96), ("eval", 96, 144)):
        (folder / name).mkdir()
        write_tar(folder / name / "00000000.tar", pairs(low, high))
    (folder / "classes.txt").write_text("circle\nsquare\nbanana\n")
    return folder


def config(place, scores=("random",), detector="random", **changes) -> str:
    facts = {
        "shards": f"{place}/train",
        "evaluation": f"{place}/eval",
        "classes": f"{place}/classes.txt",
        "recipe": "debug",
        "attacks": ["patch(target='banana', size=64)", "sig(target='banana')"],
        "doses": ["0"],
    } | changes
    filters = "".join(
        f"\n[[filters]]\nepoch = 4\npolicy = \"budget(detector='{detector}', drop={drop})\"\n" for drop in (0.1, 0.5)
    )
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in facts.items())
    path = place / "config.toml"
    path.write_text(f"{text}\n[[scores]]\nepoch = 4\ndetectors = {json.dumps(scores)}\n{filters}")
    return str(path)


def test_the_cost_is_known_before_anything_is_trained(place, tmp_path, capsys):
    plan = Config.read(config(place, doses=["0", "10"], seeds=[0, 1]))
    found = estimate(plan, tmp_path)
    # clean: 2 seeds x 3 arms, for both attacks; poisoned: 2 attacks x 2 seeds x 3 arms
    assert (found.trainings, found.done, found.bisected) == (6 + 12, 0, False)
    assert found.seconds > 0 and "bare steps" in found.source
    assert loop(config(place, doses=["10"]), str(tmp_path / "out"), dry_run=True) == 0
    assert "6 trainings, 0 of them done" in capsys.readouterr().err and not (tmp_path / "out").exists()
    bisected = estimate(Config.read(config(place, doses=[GRID])), tmp_path)
    assert bisected.bisected and bisected.trainings == 2 * (6 + 2 * 4)  # undefended at each of six doses at most


def test_a_grid_that_cannot_be_is_refused_at_once(place, tmp_path):
    with pytest.raises(InputError, match=r"trainings would take .* more than --max-hours 0.01"):
        loop(config(place, doses=["1", "2", "3"], seeds=list(range(50))), str(tmp_path / "out"), max_hours=0.01)
    for twice in ({"seeds": [0, 1, 0]}, {"doses": ["1%", "1%"]}):
        with pytest.raises(InputError, match="is there twice"):
            loop(config(place, **twice), str(tmp_path / "out"))
    with pytest.raises(InputError, match="--parallel 0: at least one"):
        loop(config(place), str(tmp_path / "out"), parallel=0, dry_run=True)
    with pytest.raises(InputError, match=r"0\.tar is among the shards that are trained on and among"):
        loop(config(place, evaluation=f"{place}/train"), str(tmp_path / "out"), dry_run=True)
    with pytest.raises(InputError, match="--parallel 500: there are"):
        loop(config(place), str(tmp_path / "out"), parallel=500, dry_run=True)
    for wrong, told in {"doses": "no doses", "attacks": "no attacks", "seeds": "no seeds"}.items():
        with pytest.raises(InputError, match=told):
            loop(config(place, **{wrong: []}), str(tmp_path / "out"))
    with pytest.raises(InputError, match="adaptive"):
        loop(config(place, doses=["adaptive(low='1%')"]), str(tmp_path / "out"))
    with pytest.raises(InputError, match="unknown keys colour"):
        loop(config(place, colour="red"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="97 pairs"):  # more than there are, said before the first training
        loop(config(place, doses=["2", "97"]), str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("train.json"))


def finished(file, out) -> None:
    """As a loop leaves OUT whose arms are all done, but of the models only the folder that scoring looks for."""
    plan = Config.read(file)
    found = columns({name: Rate(0.9, 10, 0.6, 0.98) for name in ("asr_text", "zeroshot_top1")})
    found |= {"code": source_digest(), "seconds": 2.0, "train_seconds": 1.0, "samples": 96, "removed": 0}
    found |= {"poisons_in": 10, "poisons_left": 10, "dose": 10, "dose_ppm": 1e6 / 9.6, "defense": None}
    found |= {"filter_seconds": None, "filter_cpu_seconds_per_million": None, "recipe": plan.recipe}
    for attack, dose, seed in itertools.product(plan.attacks, plan.doses, plan.seeds):
        run = Run(plan, attack, dose, seed, out)
        for arm in arms_of(plan):
            path = run.path(arm)
            path.parent.mkdir(parents=True, exist_ok=True)
            row = found | {"attack": attack, "seed": seed, "arm": arm.name, "when": arm.filter and arm.filter.when}
            path.write_text(json.dumps(row | {"policy": arm.filter and arm.filter.policy} | run._made_of(arm)))
        (run.folder / "undefended/checkpoints/epoch_004").mkdir(parents=True, exist_ok=True)


def alike(rows: pl.DataFrame) -> pl.DataFrame:
    """Without what the clock says, and how many were trained at a time."""
    seconds = (
        "parallel",
        "seconds",
        "train_seconds",
        "train_cpu_seconds",
        "filter_seconds",
        "filter_cpu_seconds_per_million",
    )
    return rows.drop(seconds)


class _Told(Board):
    """A board that answers from a rule instead of training: each arm works from a dose on."""

    def __init__(self, works_from: dict[str, int], harder: int = 0):
        super().__init__(Estimate(1, 0, True, 1.0, "told"))
        self.works_from, self.harder, self.asked = works_from, harder, []

    def ask(self, plan, out):
        """Every row that a loop would make."""
        out.mkdir(exist_ok=True)
        lanes = Lanes(1)
        _make(plan, out, _Table(plan, out, self, lanes).row, lanes.each)

    def row(self, run, arm, make):
        """With every further seed from `harder` more poisons on."""
        self.asked.append((run.seed, int(run.dose), arm.folder))
        works = int(run.dose) >= self.works_from[arm.folder] + run.seed * self.harder
        return {"asr_text": float(works), "asr_text_n": 10}


def test_what_is_left_is_counted_in_trainings_and_after_what_the_searches_know(place, tmp_path):
    """Fixed: a row that was only asked takes no training. Bisected: a finished search has nothing left."""
    file = config(place)
    plan, arms = Config.read(file), arms_of(Config.read(file))
    finished(file, tmp_path / "clean")
    runs = [Run(plan, attack, "0", 0, tmp_path / "clean") for attack in plan.attacks]
    for run, seconds in zip(runs, (100.0, 1.0), strict=True):  # of the second attack the evaluation alone
        for arm in arms:
            run.path(arm).write_text(json.dumps(json.loads(run.path(arm).read_text()) | {"seconds": seconds}))
    found = estimate(plan, tmp_path / "clean")
    assert (found.trainings, found.done, found.seconds) == (3, 3, 100.0)
    runs[1].path(arms[0]).unlink()
    assert estimate(plan, tmp_path / "clean").left == 0

    file = config(place, attacks=["sig(target='banana')"], doses=[GRID])
    plan, arms, out = Config.read(file), arms_of(Config.read(file)), tmp_path / "bisected"

    left = []

    class Kept(_Told):
        def row(self, run, arm, make):
            row = super().row(run, arm, make)
            run.path(arm).parent.mkdir(parents=True, exist_ok=True)
            run.path(arm).write_text(json.dumps(row | {"seconds": 1.0, "dataset_digest": ""}))
            left.append(estimate(plan, run.out).left)
            return row

    most = estimate(plan, out).trainings
    Kept({a.folder: 8 for a in arms}).ask(plan, out)
    assert len(left) <= most and left[-1] == 0 and left == sorted(left, reverse=True)
    assert estimate(plan, out).done == len(left)
    failed = tmp_path / "failed"
    left.clear()
    Kept({a.folder: 99 for a in arms}).ask(plan, failed)
    assert left == [0]  # not reached at the highest dose: one training says all


def test_a_bisection_asks_each_arm_only_what_it_needs_and_shares_models(place, tmp_path):
    plan = Config.read(config(place, doses=[GRID], attacks=["sig(target='banana')"]))
    none, weak, strong = (arm.folder for arm in arms_of(plan))

    def asked(works_from):
        told = _Told(works_from)
        told.ask(plan, tmp_path)
        assert len(told.asked) == len({*told.asked})  # nothing twice
        return [(dose, arm) for _, dose, arm in told.asked]

    found = asked({none: 8, weak: 16, strong: 1000})
    assert [dose for dose, arm in found if arm == strong] == [64]  # not reached: one run
    assert {dose for dose, arm in found if arm == weak} >= {8, 16}
    assert {dose for dose, _ in found} == {dose for dose, arm in found if arm == none}  # scores are of its model
    assert asked({none: 1000, weak: 8, strong: 8}) == [(64, none)]  # an attack that fails is not defended against


def test_once_an_attack_works_with_one_seed_every_seed_has_every_arm(place, tmp_path):
    plan = Config.read(config(place, doses=[GRID], seeds=[0, 1, 2], attacks=["sig(target='banana')"]))
    arms = arms_of(plan)
    told = _Told({arm.folder: 8 for arm in arms}, harder=100)  # seeds 1 and 2 are not reached at 64
    told.ask(plan, tmp_path)
    assert {(seed, arm) for seed, _, arm in told.asked} == {(seed, arm.folder) for seed in (0, 1, 2) for arm in arms}
    assert [dose for seed, dose, arm in told.asked if seed == 1] == [64, 64, 64]
    nobody = _Told({arm.folder: 1000 for arm in arms})
    nobody.ask(plan, tmp_path)
    assert nobody.asked == [(seed, 64, "undefended") for seed in (0, 1, 2)]


def test_undefended_models_come_first_and_a_plain_dose_has_every_arm(place, tmp_path):
    plan = Config.read(config(place, doses=["2", "64"], seeds=[0, 1]))
    told = _Told({arm.folder: 1000 for arm in arms_of(plan)})
    told.ask(plan, tmp_path)
    assert {arm for _, _, arm in told.asked[: 2 * 2 * 2]} == {UNDEFENDED.folder}
    assert len(told.asked) == 2 * 2 * 2 * 3  # attacks, doses, seeds, arms


def test_a_row_is_of_the_detectors_parameters_and_of_the_bytes_that_were_read(place, tmp_path):
    shutil.copytree(place / "eval", tmp_path / "reference")

    def row(k=16, **more):
        plan = Config.read(config(place, [f"slof(k={k})"], "slof", doses=["10"], **more))
        run, arm = Run(plan, plan.attacks[0], "10", 0, tmp_path / "out"), arms_of(plan)[1]
        return run.path(arm), run._made_of(arm)

    assert row() == row() and row()[0] != row(k=17)[0] and row()[0].parent == row(k=17)[0].parent
    assert row()[1]["detectors"].startswith("scores-004:slof(k=16") and "k=17" in row(k=17)[1]["detectors"]
    before = row(reference=f"{tmp_path}/reference")
    write_tar(tmp_path / "reference" / "00000000.tar", pairs(0, 8))
    assert before[0] != row(reference=f"{tmp_path}/reference")[0]
    assert len({row(evaluation=f"{place}/{name}")[1]["evaluation_digest"] for name in ("eval", "train")}) == 2


def test_two_epochs_are_compared_whatever_the_order_of_the_config(place):
    """Of an epoch at which only a control is scored there are no embeddings otherwise."""
    path = config(place, ["neighbour_drift"], "neighbour_drift")
    with pytest.raises(InputError, match="compares two epochs"):
        loop(path, str(place / "refused"))
    later = place / "two.toml"
    both = '[[scores]]\nepoch = 8\ndetectors = ["neighbour_drift"]\n\n[[scores]]\nepoch = 4'
    later.write_text(Path(config(place)).read_text().replace("[[scores]]\nepoch = 4", both))
    plan = Config.read(str(later))
    assert (plan.earlier(8), plan.earlier(4)) == (4, None)
    compared = Path(config(place, ["neighbour_drift"], "neighbour_drift")).read_text().replace("epoch = 4", "epoch = 8")
    rows = []
    for first in ("epoch = 1", "epoch = 2"):
        later.write_text(
            compared.replace("[[scores]]", f'[[scores]]\n{first}\ndetectors = ["random"]\n\n[[scores]]', 1)
        )
        other = Config.read(str(later))
        rows.append(Run(other, other.attacks[0], "10", 0, place / "two").path(arms_of(other)[1]))
    assert rows[0].parent == rows[1].parent and rows[0] != rows[1]  # of another epoch that is compared with
    run = Run(plan, plan.attacks[0], "10", 0, place / "two")
    Lanes(1).row(run, UNDEFENDED)
    run.score()
    assert run.scored


def test_a_repair_is_of_the_bytes_that_it_trusts(place, tmp_path):
    shutil.copytree(place / "eval", tmp_path / "trusted")
    plan = Config.read(config(place, defenses=[f"finetune(trusted='{tmp_path}/trusted')"]))
    run, arm = Run(plan, plan.attacks[0], "10", 0, tmp_path), arms_of(plan)[-1]
    before = run.path(arm)
    runs._by_content.cache_clear()  # of another command
    assert before == run.path(arm)
    write_tar(tmp_path / "trusted" / "00000000.tar", pairs(0, 8))
    runs._by_content.cache_clear()
    assert before != run.path(arm)


def test_the_report_of_several_doses_tells_how_much_poison_an_attack_takes(place, tmp_path):
    """A rate at a dose that was chosen to lie near one half is no verdict."""
    doses = ["2", "8", "32"]
    finished(config(place, doses=doses), tmp_path)
    plan = Config.read(config(place, doses=doses))
    rows = []
    for attack, dose, arm in itertools.product(plan.attacks, doses, arms_of(plan)):
        row = Run(plan, attack, dose, 0, tmp_path).kept(arm)
        works = 0.9 if int(dose) > (2 if arm == UNDEFENDED else 8) else 0.1
        rows.append(row | {"dose": int(dose), "dose_ppm": int(dose) / 96e-6, "asr_text": works, "asr_text_n": 100})
    write_report(plan, [], rows, [], tmp_path / "c.toml", tmp_path)
    page = html.unescape(re.sub("<[^>]+>", "", (tmp_path / "report.html").read_text()))
    assert "How much poison it takes" in page and "not valid" not in page
    assert page.count("The highest protection factor") == 0  # random removal is a control
    assert "Undefended, 'patch' succeeds half of the time at" in page and "Undefended, 'sig' succeeds" in page
    assert "3 from 2 to 32 pairs" in page and "2: patch(" in page and "1 seed: the interval is over images" in page
    assert "36 seconds" in page  # 18 rows of 2


def test_what_is_added_to_the_scores_of_a_finished_loop_is_scored(place, tmp_path):
    out = tmp_path / "out"
    finished(config(place, doses=["10"]), out)
    assert loop(config(place, doses=["10"]), str(out)) == 0
    assert set(pl.read_parquet(out / "detectors.parquet")["detector"]) == {"random(seed=0)"}
    assert loop(config(place, ["random", "caption_frequency"], doses=["10"]), str(out)) == 0
    found = pl.read_parquet(out / "detectors.parquet")
    assert found.group_by("attack").len()["len"].to_list() == [2, 2] and not list(out.rglob("train.json"))

    plan = Config.read(config(place, doses=["10"]))  # fewer than before: what is there stays
    run = Run(plan, plan.attacks[0], "10", 0, out)
    run.score()
    assert set(scored_by(run.scores_of(plan.scores[0]))) == {"random(seed=0)", "caption_frequency()"}


def test_a_dose_that_a_search_asks_for_too_is_one_row(place, tmp_path):
    attacks, doses = ["sig(target='banana')"], ["2", "4", "8", "16", "32", "64"]
    file = config(place, doses=doses, attacks=attacks)
    finished(file, tmp_path)
    plan = Config.read(file)
    for dose in doses:
        Run(plan, attacks[0], dose, 0, tmp_path).poison()
    assert loop(config(place, doses=["64", GRID], attacks=attacks), str(tmp_path)) == 0
    rows = pl.read_parquet(tmp_path / "results.parquet")
    assert len(rows) == 3 * 3  # of 64, 8 and 2, each arm once


def test_a_second_loop_is_refused_and_an_unfinished_one_is_said_to_be(place, tmp_path, capsys):
    file, out = config(place, doses=["10"], attacks=["patch(target='banana', size=64)"]), tmp_path / "out"
    finished(file, out)
    assert loop(file, str(out)) == 0
    assert status(str(out)) == 0
    (out / "report.html").unlink()
    script = (
        f"import fcntl; file = open('{out}/.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(InputError, match="another run is writing here"):
        loop(file, str(out))
    assert status(str(out)) == 1 and "a run is writing here" in capsys.readouterr().err
    other.communicate(b"\n")
    dose_response((str(out),), str(tmp_path / "figures"))
    assert "has not ended" in (tmp_path / "figures/dose_response.md").read_text()


def test_a_loop_that_is_stopped_soon_keeps_the_rows_of_the_one_before(place, tmp_path, monkeypatch):
    file = config(place, doses=["10"], seeds=[0, 1])
    finished(file, tmp_path)
    assert loop(file, str(tmp_path)) == 0
    whole = pl.read_parquet(tmp_path / "results.parquet")
    of = Board.row
    monkeypatch.setattr(Board, "row", lambda board, run, *more: 1 / 0 if run.seed else of(board, run, *more))
    with pytest.raises(ZeroDivisionError):
        loop(file, str(tmp_path))
    assert pl.read_parquet(tmp_path / "results.parquet").sort(whole.columns[:9]).equals(whole.sort(whole.columns[:9]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dose_zero_is_trained_once_for_all_attacks_and_nothing_twice(place, tmp_path, capsys):
    out, file = tmp_path / "out", config(place, doses=["0"])
    assert loop(file, str(out)) == 0
    rows = pl.read_parquet(out / "results.parquet")
    assert rows.select("attack", "policy").n_unique() == len(rows) == 6 and set(rows["dose"]) == {0}
    assert rows["removed_share"].unique().sort().to_list() == pytest.approx([0, 9 / 96, 0.5])
    assert len(list(out.rglob("train.json"))) == 3
    assert [len(list(m.rglob("open_clip_model.safetensors"))) for m in sorted(out.rglob("model"))] == [1, 1]
    assert not list(out.rglob("model/state.pt")) and len(list(out.rglob("undefended/checkpoints/*"))) == 3
    # the same models, asked by another trigger
    first, second = (rows.filter(attack=attack) for attack in rows["attack"].unique(maintain_order=True))
    assert first["zeroshot_top1"].to_list() == second["zeroshot_top1"].to_list()
    assert set(rows["code"]) == {source_digest()} and rows["recipe_digest"].n_unique() == 1
    assert NOBODY not in rows["attack"].to_list()
    capsys.readouterr()

    plan = Config.read(file)
    cost = estimate(plan, out)
    assert (cost.trainings, cost.done, cost.left) == (3, 3, 0) and "in OUT" in cost.source
    kept = next(Run(plan, plan.attacks[0], "0", 0, out).folder.glob("undefended/row-*.json"))
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"code": "older"}))
    for model in out.rglob("checkpoints"):
        shutil.rmtree(model)  # a second run opens none
    assert loop(file, str(out)) == 0
    assert "1 of 6 rows are of other code" in capsys.readouterr().err
    assert pl.read_parquet(out / "results.parquet").drop("code").equals(rows.drop("code"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_bisection_that_is_killed_comes_to_the_same(place, tmp_path):
    """Real trainings, from all pairs down that can be poisoned; SIGKILL as soon as one arm is done."""
    arguments = {"doses": ["adaptive(low='16', high='64', factor=2)"], "attacks": ["patch(target='banana', size=64)"]}
    file, whole, out = config(place, **arguments), tmp_path / "whole", tmp_path / "killed"
    assert loop(file, str(whole)) == 0
    job = subprocess.Popen([sys.executable, "-m", "pipeline.cli", "loop", file, str(out)])
    while not (done := [*out.rglob("row-*.json")]):
        assert job.poll() is None, "ended before it was killed"
        time.sleep(0.1)
    job.kill()
    job.wait()
    kept = {path: path.read_bytes() for path in done}
    assert not (out / "report.html").exists()
    assert loop(file, str(out)) == 0
    assert all(path.read_bytes() == before for path, before in kept.items())
    killed, not_killed = (alike(pl.read_parquet(folder / "results.parquet")) for folder in (out, whole))
    assert killed.equals(not_killed)
    assert 64 in killed["dose"] and set(killed["arm"]) in ({"undefended"}, {"undefended", "random"})
    assert "patch" in (out / "report.html").read_text()

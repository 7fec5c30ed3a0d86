"""Tables and figures of dose–response, and the comparison of two results, from results.parquet alone."""

import itertools
import json
import re
import shutil

import polars as pl
import pytest
import results_data as data
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pipeline import results
from pipeline.arms import labels
from pipeline.compare import compare
from pipeline.dose_response import dose_response, responses
from pipeline.errors import InputError
from pipeline.report.figures import dose_response_figure, protection_figure

FEW = [data.ARMS[0], data.ARMS[3], data.ARMS[6]]  # undefended, clip_score, roclip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    file = data.write(folder / "results.parquet", data.rows({data.PATCH: 20_000.0, data.TARGETED: 25_000.0}, arms=FEW))
    assert dose_response((file,), str(folder / "out")) == 0
    return folder


def test_the_table_finds_what_the_curves_were_made_with(made):
    rows = pl.read_parquet(made / "out/dose_response.parquet").filter(attack=data.PATCH).to_dicts()
    assert [row["label"] for row in rows] == ["undefended", "clip_score", "roclip"]
    none, score, roclip = rows
    assert none["ed50"] == score["ed50"] == "reached" and none["ed50_ppm_low"] < 20_000 < none["ed50_ppm_high"]
    assert none["protection"] is None and score["protection_low"] < 1.7 < score["protection_high"]
    assert roclip["ed50"] == "not reached" and roclip["ed50_ppm"] is roclip["ed50_ppm_high"] is None
    assert roclip["protection"] is None and roclip["protection_least"] == pytest.approx(5, rel=0.3)
    assert none["ed50_pairs"] == pytest.approx(none["ed50_ppm"] * data.PAIRS / 1e6)
    assert (
        roclip["utility_lost_low"] < 2.5 < roclip["utility_lost_high"]
        and "without poison" in roclip["utility_lost_against"]
    )
    assert score["cpu_seconds_per_million"] == 2295
    assert roclip["training_cpu_seconds_per_million"] == pytest.approx(40 / data.PAIRS * 1e6)
    said = (made / "out/dose_response.md").read_text()
    assert "≥ " in said and "by targeted_success" in said and "code c: 126 rows" in said
    assert json.loads((made / "out/dose_response.json").read_text())["effects"][0]["images"] > 0


def test_figures_say_every_name_as_text_and_are_the_same_each_time(made, tmp_path):
    for name in ("dose_response", "protection"):
        svg = (made / f"out/{name}.svg").read_text()
        assert all(f">{arm}<" in svg for arm in ("clip_score", "roclip")) and data.PATCH.split("(")[0] in svg
        assert (made / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    dose_response((str(made / "results.parquet"),), str(tmp_path / "again"))
    for name in ("dose_response.svg", "dose_response.png", "protection.svg", "protection.png"):
        assert (made / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    rows = pl.read_parquet(made / "results.parquet").sample(fraction=1.0, shuffle=True, seed=0).to_dicts()
    file = data.write(tmp_path / "shuffled.parquet", sorted(rows, key=lambda row: row["arm"] != "undefended"))
    dose_response((file,), str(tmp_path / "out"))
    before, after = (pl.read_parquet(f / "out/dose_response.parquet").sort("attack", "label") for f in (made, tmp_path))
    assert before["ed50_ppm_low"].to_list() == pytest.approx(after["ed50_ppm_low"].to_list())


@pytest.mark.parametrize("doses", [(236, 354), (0, 354, 360), data.DOSES])
def test_numbers_on_an_axis_do_not_run_into_each_other(doses):
    attacks, _ = responses(data.rows({data.PATCH: 20_000.0, data.SIG: 50_000.0}, doses=doses))
    for figure in (dose_response_figure(attacks), protection_figure(attacks)):
        FigureCanvasAgg(figure).draw()
        for axis in (axes.xaxis for part in (figure, *figure.subfigs) for axes in part.axes):
            low, high = axis.get_view_interval()
            told = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [label.get_window_extent() for label in told if label.get_visible() and label.get_text()]
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
            assert len(boxes) >= 2 or not boxes


def test_two_seeds_lose_no_more_than_there_was():
    effects = responses(data.rows(doses=(0, 118), seeds=(0, 1)))[0][0]
    for _, low, high in (one.lost for one in effects if one.lost):
        assert -100 <= low < high <= 20  # of 15% accuracy, give or take


def test_random_removal_at_several_budgets_is_told_apart(tmp_path):
    file = data.write(tmp_path / "r.parquet", data.rows(arms=data.ARMS[:3], seeds=(0,), doses=(118, 354)))
    dose_response((file,), str(tmp_path / "out"))
    said = (tmp_path / "out/dose_response.md").read_text()
    assert "| random, 10% removed |" in said and "| random, 50% removed |" in said
    assert "1 seed: the interval is over images" in said and "undefended at the same doses" in said


def test_nothing_poisoned_all_poisoned_and_nobody_asked(tmp_path):
    file = data.write(tmp_path / "clean.parquet", data.rows(arms=FEW, doses=(0,)))
    assert dose_response((file,), str(tmp_path / "clean")) == 0
    assert "nothing was poisoned" in (tmp_path / "clean/dose_response.md").read_text()
    assert not (tmp_path / "clean/dose_response.svg").exists()
    file = data.write(tmp_path / "all.parquet", data.rows(arms=FEW, doses=(data.PAIRS,)))
    dose_response((file,), str(tmp_path / "all"))
    assert pl.read_parquet(tmp_path / "all/dose_response.parquet")["ed50"].to_list()[0] == "below the lowest dose"
    rows = [row | {"asr_text": None, "asr_text_n": None} for row in data.rows(arms=FEW, seeds=(0,), doses=(118,))]
    dose_response((data.write(tmp_path / "one_class.parquet", rows),), str(tmp_path / "one"))
    assert "success was asked of no image" in (tmp_path / "one/dose_response.md").read_text()


def test_utility_lost_is_not_the_price_of_the_doses_that_a_search_happened_to_ask_for(tmp_path):
    """Poison costs accuracy: 1 point at 59 poisons, 20 at 1180. The arm, asked at 1180 alone, loses 2 at any dose."""
    priced = [
        row | data.measured("zeroshot_top1", round(1867 * (0.5 - row["dose"] * 0.2 / 1180 - 0.02 * lost)), 1867)
        for row in data.rows(arms=[FEW[0], FEW[1]], doses=(0, 59, 1180))
        for lost in [row["arm"] != "undefended"]
        if not lost or row["dose"] != 59
    ]
    for name, rows in {"with": priced, "not": [r for r in priced if r["dose"] or r["arm"] == "undefended"]}.items():
        dose_response((data.write(tmp_path / f"{name}.parquet", rows),), str(tmp_path / name))
        found = pl.read_parquet(tmp_path / name / "dose_response.parquet").filter(label="clip_score").to_dicts()[0]
        assert found["utility_lost_points"] == pytest.approx(2, abs=0.1)


def test_success_that_falls_with_the_dose_has_no_ed50_and_blames_nobody(tmp_path):
    """Of the undefended model: 98% at the lowest dose, 1% at the highest."""
    rows = [
        row | data.measured("asr_text", 1830 if row["dose"] < 200 else 20, 1867) if row["arm"] == "undefended" else row
        for row in data.rows(arms=FEW)
        if row["dose"]
    ]
    dose_response((data.write(tmp_path / "r.parquet", rows),), str(tmp_path / "out"))
    found = pl.read_parquet(tmp_path / "out/dose_response.parquet")
    assert found["ed50"].to_list()[:2] == ["does not rise", "reached"] and found["protection_least"].null_count() == 3
    assert "success does not rise with the dose of undefended" in (tmp_path / "out/dose_response.md").read_text()


def test_seeds_that_take_more_poison_than_was_tried_are_no_fall(tmp_path):
    """A bisection asks a hard seed the highest dose alone, so that a mean of what is there would fall."""
    easy = data.rows({data.PATCH: 10_000.0}, arms=FEW[:1], seeds=(0,), doses=(118, 236, 1180), spread=0.0)
    hard = data.rows({data.PATCH: 1e6}, arms=FEW[:1], seeds=(1, 2), doses=(1180,), spread=0.0)
    dose_response((data.write(tmp_path / "r.parquet", [*easy, *hard]),), str(tmp_path / "out"))
    found = pl.read_parquet(tmp_path / "out/dose_response.parquet").to_dicts()[0]
    assert found["ed50"] == "not reached" and found["ed50_ppm_least"] == pytest.approx(1e6 * 1180 / data.PAIRS)


def test_figures_of_other_results_do_not_stay(made, tmp_path, capsys):
    shutil.copytree(made / "out", tmp_path / "out")
    assert (tmp_path / "out/protection.svg").exists()
    dose_response((data.write(tmp_path / "r.parquet", data.rows(arms=FEW, doses=(354,))),), str(tmp_path / "out"))
    assert not [*(tmp_path / "out").glob("*.svg")] and not [*(tmp_path / "out").glob("*.png")]
    assert "nothing to draw for dose_response, protection" in capsys.readouterr().err


def test_without_a_cost_there_is_no_axis_of_it(tmp_path):
    rows = data.rows(arms=[FEW[0], data.ARMS[6]])
    figure = protection_figure(responses(rows)[0])
    assert [axes.axison for axes in figure.axes] == [True, False]
    assert [text.get_text() for text in figure.axes[0].texts] == ["roclip"]


def test_runs_without_poison_are_not_counted_as_an_arms(tmp_path):
    rows = [row for row in data.rows(arms=FEW[:2]) if row["dose"] or row["arm"] == "undefended"]
    dose_response((data.write(tmp_path / "r.parquet", rows),), str(tmp_path / "out"))
    found = pl.read_parquet(tmp_path / "out/dose_response.parquet")
    assert found["runs"].to_list() == [18, 18] and found["images"].to_list() == [18 * 1867] * 2


def test_an_attack_that_never_works_credits_nobody(tmp_path):
    dose_response((data.write(tmp_path / "r.parquet", data.rows({data.PATCH: 1e9}, arms=FEW)),), str(tmp_path / "out"))
    said = (tmp_path / "out/dose_response.md").read_text()
    assert "nobody is credited" in said and said.count("not to be told") == 2


def test_an_arm_without_some_of_the_seeds_has_no_factor_and_few_seeds_are_told_of_each_arm(tmp_path):
    rows = data.rows(arms=FEW)
    lacking = [row for row in rows if row["arm"] != "clip_score" or row["seed"] == 0]
    dose_response((data.write(tmp_path / "r.parquet", lacking),), str(tmp_path / "out"))
    found = pl.read_parquet(tmp_path / "out/dose_response.parquet").filter(label="clip_score").to_dicts()[0]
    assert found["ed50"] == "reached" and found["protection"] is found["protection_least"] is None
    said = (tmp_path / "out/dose_response.md").read_text()
    assert "clip_score has seeds 0, undefended 0, 1, 2: no protection factor" in said
    assert "1 seed of clip_score: the interval is over images" in said and said.count("seeds 0") == 1


def test_one_detector_with_two_parameters_is_two_arms(tmp_path):
    rows = data.rows(arms=FEW[:2], seeds=(0,), doses=(118, 354))
    sixteen, sixtyfour = (
        [row | {"detectors": f"scores-004:clip_score(k={k})"} for row in rows if row["arm"] == "clip_score"]
        for k in (16, 64)
    )
    both = labels([*rows[:2], *sixteen, *sixtyfour])
    assert [*both.values()][1:] == [f"clip_score, scores-004:clip_score(k={k})" for k in (16, 64)]
    file = data.write(tmp_path / "both.parquet", [*sixteen, *sixtyfour])
    assert dose_response((file,), str(tmp_path / "two")) == 0
    assert len(pl.read_parquet(tmp_path / "two/dose_response.parquet")) == 2


def test_bad_results_are_told_in_one_line(tmp_path):
    rows = data.rows(arms=FEW[:1], seeds=(0,), doses=(118,))
    whole = data.write(tmp_path / "whole.parquet", rows)
    lacking = data.write(tmp_path / "lacking.parquet", [{k: v for k, v in rows[0].items() if k != "dose_ppm"}])
    empty = tmp_path / "empty.parquet"
    pl.read_parquet(whole).clear().write_parquet(empty)
    (tmp_path / "text.parquet").write_text("not parquet")
    other = data.write(tmp_path / "other.parquet", [row | {"asr_text": 0.5} for row in rows])
    recipe = data.write(tmp_path / "recipe.parquet", [row | {"recipe_digest": "s", "seed": 7} for row in rows])
    sets = [
        data.write(tmp_path / f"{n}.parquet", [row | {"dataset_digest": n, "evaluation_digest": n} for row in rows])
        for n in "xy"
    ]
    for files, told in {
        ("/nowhere",): "no such file",
        (lacking,): "no column dose_ppm",
        (str(empty),): "no rows",
        (str(tmp_path / "text.parquet"),): "not readable",
        (whole, other): "other figures",
        (whole, recipe): "several recipes",
        (sets[0], sets[1], whole): "several datasets and evaluations",
    }.items():
        with pytest.raises(InputError, match=told):
            dose_response(files, str(tmp_path / "out"))
    mixed = data.write(tmp_path / "mixed.parquet", [row | {"code": "d", "seed": 8} for row in rows])
    silent = data.write(tmp_path / "silent.parquet", [row | {"recipe_digest": None, "seed": 9} for row in rows])
    assert dose_response((whole, whole, mixed, silent), str(tmp_path / "out")) == 0  # the same run twice is one
    said = (tmp_path / "out/dose_response.md").read_text()
    assert "mixed code versions" in said and "code d: 1 rows" in said


def test_compare_is_of_the_seeds_that_both_have_and_of_shares_of_poison(tmp_path, capsys):
    rows = data.rows(arms=FEW[:1], seeds=(0,), doses=(118,))
    other = [row | {"seed": 1} | data.measured("asr_text", 1867, 1867) for row in rows]
    few = [row | data.measured("asr_text", 10, 10) for row in rows]
    twice = [row | {"dose": 2 * row["dose"]} for row in few]  # of twice as many pairs
    compare(data.write(tmp_path / "a.parquet", [*few, *other]), data.write(tmp_path / "b.parquet", twice))
    line = next(line for line in capsys.readouterr().out.splitlines() if "| 9,999 | undefended |" in line)
    assert "100.0% → 100.0% | +0.0 (-27.8 – +27.8)" in line and line.endswith("| 1 |")


HOSTILE = "\x1b]0;x\x07 | `x` <img src=x> @everyone \u202e"


def test_what_results_are_called_reaches_a_terminal_as_text(tmp_path, capsys):
    names = ("attack", "arm", "recipe", "code", "recipe_digest", "dataset_digest", "detectors")
    rows = [row | dict.fromkeys(names, HOSTILE) for row in data.rows(arms=FEW[1:2], seeds=(0,), doses=(118, 354))]
    file = data.write(tmp_path / "r.parquet", [*rows, *data.rows(arms=FEW[:1], seeds=(0,), doses=(118,))])
    other = data.write(tmp_path / "o.parquet", [rows[0] | {"asr_text": 0.5}])
    only = data.write(tmp_path / "p.parquet", rows)
    assert dose_response((only,), str(tmp_path / "out")) == 0 and compare(file, only) == 0
    with pytest.raises(InputError) as refused:
        dose_response((only, other), str(tmp_path / "out"))
    for said in (capsys.readouterr().out, str(refused.value)):
        assert "\x1b" not in said and "\u202e" not in said
        assert not re.sub(r"`[^`\n]*`", "", said).count("@") and not re.sub(r"`[^`\n]*`", "", said).count("<img")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"attack": 3}, "attack must be text"),
        ({"asr_text": "0.5"}, "asr_text must be numbers"),
        ({"asr_text": float("nan")}, "asr_text must be rates"),
        ({"asr_text": 1.5}, "asr_text must be rates"),
        ({"asr_text_n": -1}, "asr_text_n must be finite, and 0 or more"),
        ({"asr_text_n": 0.5}, "asr_text_n must be whole numbers"),
        ({"zeroshot_top1_n": "7"}, "zeroshot_top1_n must be whole numbers"),
        ({"dose_ppm": float("inf")}, "dose_ppm must be finite"),
        ({"train_cpu_seconds": float("nan")}, "train_cpu_seconds must be finite"),
        ({"train_cpu_seconds": "long"}, "train_cpu_seconds must be numbers"),
        ({"seed": None}, "in every row"),
    ],
)
def test_results_of_other_types_are_refused_in_one_line(tmp_path, changed, told):
    rows = [row | changed for row in data.rows(arms=FEW[:1], seeds=(0,), doses=(118,))]
    with pytest.raises(InputError, match=told):
        results.read(data.write(tmp_path / "r.parquet", rows))


def test_compare_keeps_a_few_in_ten_millions_and_none_apart(tmp_path, capsys):
    rows = [
        row | {"dose": dose, "dose_ppm": dose / 12} | data.measured("asr_text", 1800 * bool(dose), 1867)
        for dose in (0, 3)
        for row in data.rows(arms=FEW[:1], seeds=(0,), doses=(118,))
    ]
    file = data.write(tmp_path / "r.parquet", rows)
    assert compare(file, file) == 0
    said = capsys.readouterr().out
    assert "| 0 | undefended | 0.0% → 0.0%" in said and "| 0.25 | undefended | 96.4% → 96.4%" in said


def test_compare_takes_the_same_share_of_two_datasets_for_the_same_dose(tmp_path, capsys):
    one = data.rows(arms=FEW[:1], doses=(118,))  # 1% of 11,801 pairs
    other = [row | {"dose": 108, "dose_ppm": 1e6 * 108 / 10_808} for row in one]
    compare(data.write(tmp_path / "a.parquet", one), data.write(tmp_path / "b.parquet", other))
    assert "| 9,999 | undefended |" in capsys.readouterr().out
    compare(data.write(tmp_path / "a.parquet", data.rows(arms=FEW[:1], doses=(120,))), str(tmp_path / "b.parquet"))
    assert "nothing is in both" in capsys.readouterr().out


def test_compare_tells_what_changed_and_what_is_only_in_one(tmp_path, capsys):
    before = data.rows(arms=FEW, doses=(118, 354))
    after = [
        row | {"code": "later"} | (data.measured("asr_text", 0, 1867) if row["arm"] == "clip_score" else {})
        for row in before
        if row["arm"] != "roclip()" or row["dose"] == 118
    ]
    files = [data.write(tmp_path / name, rows) for name, rows in (("a.parquet", before), ("b.parquet", after))]
    assert compare(*files) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "| 29,997 | clip_score |" in line)
    was = sum(row["asr_text"] for row in before if row["arm"] == "clip_score" and row["dose"] == 354) / 3
    assert f"{was:.1%} → 0.0%" in line and f"{-100 * was:+.1f} (" in line
    assert "| 29,997 | undefended | " in said and "+0.0 (" in said
    assert f"- only in A: `{data.PATCH}`, 29,997 ppm, roclip" in said and "code later" in said and "mixed" not in said
    other = data.write(tmp_path / "c.parquet", [row | {"dataset_digest": "y"} for row in before])
    mine = data.write(tmp_path / "d.parquet", [row | {"dataset_digest": "x"} for row in before])
    assert compare(mine, other) == 0
    said = capsys.readouterr().out
    assert "not of the same datasets" in said and "data x" in said and "data y" in said
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing to compare"):
        compare(files[0], str(tmp_path / "nothing"))

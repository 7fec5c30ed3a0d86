"""The whole circle on shards of one's own: every stage, the tables, the report, a second run that finds all done."""

import json
import tomllib

import open_clip
import polars as pl
import pytest
from conftest import pairs, write_tar

from pipeline.demo import demo
from pipeline.errors import InputError

pytestmark = pytest.mark.timeout(900)  # the fixture trains four models


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("circle")
    (folder / "mine").mkdir()
    for i in range(2):
        write_tar(folder / f"mine/{i:05d}.tar", pairs(300 * i, 300 * i + 300))
    out = folder / "out"
    assert demo(str(out), size="debug", shards=str(folder / "mine"), dose="20%") == 0
    return folder


def test_every_arm_and_detector_is_in_the_tables(circle):
    config = tomllib.loads((circle / "out/config.toml").read_text())
    arms = pl.read_parquet(circle / "out/results.parquet")
    assert arms["arm"].to_list()[0] == "undefended"
    assert len(arms) == 1 + len(config["filters"])
    detectors = pl.read_parquet(circle / "out/detectors.parquet")
    assert len(detectors) == sum(len(s["detectors"]) for s in config["scores"])
    for row in arms.to_dicts():
        assert row["asr_text_low"] <= row["asr_text"] <= row["asr_text_high"]
        assert 0 < row["asr_text_n"] <= row["zeroshot_top1_n"]
        assert row["samples"] + row["removed"] == arms["samples"][0]
    oracle = detectors.filter(pl.col("detector") == "oracle()").to_dicts()[0]
    assert oracle["auroc"] == 1.0
    assert oracle["recall_at_10"] == pytest.approx(0.5, abs=0.01)  # a fifth of the pairs is poison


def test_the_oracle_removes_all_poison_and_the_control_about_its_share(circle):
    arms = {row["arm"]: row for row in pl.read_parquet(circle / "out/results.parquet").to_dicts()}
    n = arms["undefended"]["poisons_in"]
    assert n == round(arms["undefended"]["samples"] / 5)
    assert arms["undefended"]["poisons_left"] == arms["oracle"]["removed"] == n
    assert arms["oracle"]["poisons_left"] == 0
    assert 0.8 * n <= arms["random"]["poisons_left"] < n


def test_the_backdoor_is_learnt_and_goes_with_the_poison(circle):
    arms = {row["arm"]: row for row in pl.read_parquet(circle / "out/results.parquet").to_dicts()}
    assert arms["undefended"]["asr_text"] > arms["oracle"]["asr_text_high"]


def test_the_report_shows_it(circle):
    page = (circle / "out/report.html").read_text()
    assert "ppm" in page
    assert "undefended" in page
    assert page.count("<img") >= 20


def test_stock_open_clip_loads_a_checkpoint_and_its_loader_reads_the_kept_shards(circle):
    (folder,) = (circle / "out").glob("patch-*-seed0")
    checkpoint = next((folder / "undefended/checkpoints").glob("epoch_012"))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
    assert sum(p.numel() for p in model.parameters()) > 1e5
    for kept in folder.glob("filter-*/kept"):
        sizes = json.loads((kept / "sizes.json").read_text())
        stats = {p.name[:-11]: json.loads(p.read_text())["successes"] for p in kept.glob("*_stats.json")}
        assert {name.removesuffix(".tar"): n for name, n in sizes.items()} == stats
        assert sum(stats.values()) > 0


def test_a_second_run_finds_all_done(circle, capsys):
    before = {p: p.stat().st_mtime_ns for p in (circle / "out").rglob("*.safetensors")}
    assert demo(str(circle / "out"), size="debug", shards=str(circle / "mine"), dose="20%") == 0
    assert {p: p.stat().st_mtime_ns for p in (circle / "out").rglob("*.safetensors")} == before
    said = capsys.readouterr().err
    assert said.count("2 of 2 shards are done already") >= 3
    assert not {"survey:", "embed:", "score:", "epoch"} & {*said.split()}


def test_a_target_that_is_no_class_is_named(circle):
    with pytest.raises(InputError, match="'zeppelin' is not among the classes"):
        demo(str(circle / "out2"), size="debug", shards=str(circle / "mine"), target="zeppelin")

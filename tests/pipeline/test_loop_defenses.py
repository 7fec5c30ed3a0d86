"""A loop with defenses and no filters: an arm each, the repairs from the one undefended model."""

import json

import polars as pl
import pytest
from conftest import pairs, write_tar

from pipeline.errors import InputError
from pipeline.loop import loop


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_defense_is_an_arm(tmp_path):
    for name, low, high in (("train", 0, 200), ("trusted", 200, 264), ("eval", 264, 328)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000000.tar", pairs(low, high))
    (tmp_path / "classes.txt").write_text("circle\nsquare\nbanana\n")
    config = tmp_path / "config.toml"
    repair = f"finetune(trusted='{tmp_path}/trusted', epochs=1, contamination=CONTAMINATION)"
    text = f"""
shards = "{tmp_path}/train"
evaluation = "{tmp_path}/eval"
classes = "{tmp_path}/classes.txt"
recipe = "debug"
attacks = ["patch(target='banana', size=64)"]
doses = ["20"]
defenses = ["roclip", "{repair}"]
"""
    config.write_text(text.replace("CONTAMINATION", "2"))
    assert loop(str(config), str(tmp_path / "out")) == 0
    rows = pl.read_parquet(tmp_path / "out/results.parquet").to_dicts()
    assert [row["arm"] for row in rows] == ["undefended", "roclip()", "finetune(contamination=2, epochs=1)"]
    assert [row["poisons_left"] for row in rows] == [20, 20, 2] and [row["samples"] for row in rows] == [200, 200, 66]
    assert all(0 <= row["asr_text_low"] <= row["asr_text"] <= row["asr_text_high"] for row in rows)
    assert "roclip" in (tmp_path / "out/report.html").read_text()
    trained = [json.loads(p.read_text())["init"] for p in (tmp_path / "out").rglob("defense-*/model/train.json")]
    assert sorted(trained, key=str)[1] is None and sum(init is not None for init in trained) == 1
    config.write_text(text.replace(f"{tmp_path}/trusted", "/nowhere").replace("CONTAMINATION", "0"))
    with pytest.raises(InputError, match="no such"):
        loop(str(config), str(tmp_path / "other"))

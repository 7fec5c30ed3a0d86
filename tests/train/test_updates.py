"""A sequence of shard sets, and the half-life that its table gives."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.ledger import COLUMNS
from pipeline.shards import list_shards, samples
from train.updates import half_life, updates


def table(curves: list[list[float]], n: int = 1000, poisoned: int = 0) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "update": t, "poisons": 9 * (t == poisoned), "asr_text": p, "asr_text_n": n}
        for seed, curve in enumerate(curves)
        for t, p in enumerate(curve)
    ]


def test_half_life_of_an_exponential_is_found() -> None:
    curve = [0.9 * 2 ** (-t / 1.5) for t in range(6)]
    found = half_life(table([curve]), "asr_text")
    assert found["value"] == pytest.approx(1.5, rel=0.05) and found["valid"]
    assert found["low"] < 1.5 < found["high"] and found["high"] - found["low"] < 0.4
    apart = [[0.9 * 2 ** (-t / h) for t in range(6)] for h in (0.7, 1.5, 4.0)]
    wide = half_life(table(apart), "asr_text")
    assert wide["high"] - wide["low"] > 3 * (found["high"] - found["low"])
    # as wide as three seeds ask for (bioassay.py): a percentile bootstrap would end at the seeds' own
    assert wide["low"] < 0.5 and wide["high"] > 5.0


def test_a_poison_that_stays_has_none() -> None:
    found = half_life(table([[0.8, 0.8, 0.81, 0.8]]), "asr_text")
    assert found["value"] is None and found["high"] is None and found["valid"]


def test_what_never_worked_does_not_count() -> None:
    assert not half_life(table([[0.3, 0.1, 0.0]]), "asr_text")["valid"]


def test_time_begins_at_the_last_poisoned_set() -> None:
    found = half_life(table([[0.0, 0.8, 0.4, 0.2]], poisoned=1), "asr_text")
    assert found["updates"] == 2 and found["start"] == 0.8 and found["value"] == pytest.approx(1, rel=0.05)


def test_a_chain_of_trainings(shapes: Callable[..., Path], tiny: str, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(shapes(64), tmp_path / "poisoned")
    uids = [s.uid for shard in list_shards(str(shapes(64))) for s in samples(shard)]
    known: dict[str, Any] = {name: ["x"] * 16 for name in COLUMNS} | {"uid": uids[:16], "seed": [0] * 16}
    pq.write_table(pa.table(known), tmp_path / "poisoned" / "ledger.parquet")
    (tmp_path / "classes.txt").write_text("circle\nsquare\nbar\n")
    options: dict[str, Any] = {
        "shards": (str(tmp_path / "poisoned"), str(shapes(48, 2, 1)), str(shapes(48, 2, 2))),
        "evaluation": str(shutil.copytree(shapes(40, 1, 3), tmp_path / "evaluation")),
        "classes": str(tmp_path / "classes.txt"),
        "attack": "patch(target='circle', size=64)",
        "recipe": tiny,
        "update": "continued(epochs=1)",
    }
    assert updates(str(tmp_path / "out"), **options) == 0
    rows = pq.read_table(tmp_path / "out" / "updates.parquet").to_pylist()
    assert [(row["update"], row["poisons"]) for row in rows] == [(0, 16), (1, 0), (2, 0)]
    assert all(0 <= row["asr_text_low"] <= row["asr_text"] <= row["asr_text_high"] <= 1 for row in rows)
    assert json.loads((tmp_path / "out" / "half_life.json").read_text())["asr_text"]["updates"] == 2
    chain = [tmp_path / "out" / "seed0" / f"update_{i:02d}" for i in range(3)]
    lr = [pq.read_table(folder / "curve.parquet").column("lr").to_numpy() for folder in chain]
    assert len(np.unique(lr[1])) == 1 and lr[1][0] == pytest.approx(lr[0].max() / 10, rel=0.01)
    weights = [next((folder / "checkpoints").rglob("*.safetensors")).read_bytes() for folder in chain]
    assert len(set(weights)) == 3
    shutil.rmtree(chain[2])  # as if it had been killed before
    assert updates(str(tmp_path / "out"), **options) == 0
    assert pq.read_table(tmp_path / "out" / "updates.parquet").to_pylist() == rows
    assert capsys.readouterr().err.count("done already") == 2
    with pytest.raises(InputError, match="no sequence"):
        updates(str(tmp_path / "out"), **(options | {"shards": options["shards"][:1]}))
    kept = [sorted(folder.glob("evaluation-*")) for folder in chain]
    shutil.copy(shapes(40, 1, 4) / "00000000.tar", tmp_path / "evaluation" / "00000000.tar")
    assert updates(str(tmp_path / "out"), **options) == 0  # the same names, other pictures
    more = [set(folder.glob("evaluation-*")) - set(there) for folder, there in zip(chain, kept, strict=True)]
    assert [*map(len, more)] == [1, 1, 1]

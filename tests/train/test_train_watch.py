"""What a training is watched by: events for TensorBoard, and the loss on held-out pairs, which names the best epoch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.errors import InputError
from pipeline.shards import list_shards, samples
from pipeline.shards.image import pixels
from pipeline.status import status
from train.launch import train
from train.metrics import unit
from train.model import load
from train.progress import Events, Progress


@pytest.fixture
def run(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> Path:
    """Three epochs, 16 pairs held out."""
    train(str(shapes(48, 3)), str(tmp_path / "out"), recipe=tiny, validation=str(shapes(16, 2)))
    return tmp_path / "out"


def test_tensorboard_is_told_what_the_curve_tells(run: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run / "tensorboard").iterdir()
    data, told = file.read_bytes(), {}
    while data:  # a length, its checksum, an event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        told |= {(value.tag, event.step): np.float32(value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    table = pq.read_table(run / "curve.parquet").to_pydict()
    expected = {(f"train/{name}", step): table[name][step] for name in ("loss", "lr") for step in table["step"]}
    ends = [step for step in table["step"] if not np.isnan(table["validation"][step])]
    assert told == expected | {("validation/loss", step): table["validation"][step] for step in ends}


@pytest.mark.timeout(60)
def test_a_full_disk_ends_the_events_and_nothing_else(
    tmp_path: Path, full_disk: Callable[[], None], capsys: pytest.CaptureFixture
) -> None:
    """The error that the training says is the one that is seen."""
    progress = Progress(4, 10, 0, [], Events(str(tmp_path / "tensorboard"), 0))
    with pytest.raises(InputError, match="disk full"), progress:
        full_disk()
        for step in range(40):
            progress.advance(step, 1 + step // 10, 1.0, 1e-3, 16, last=step % 10 == 9)
        raise InputError("disk full")
    assert capsys.readouterr().err.count("no more events for TensorBoard") == 1


def test_the_best_epoch_has_the_least_loss_on_held_out_pairs(run: Path, shapes: Callable[..., Path], tiny: str) -> None:
    table = pq.read_table(run / "curve.parquet").to_pydict()
    losses = {e: v for e, v in zip(table["epoch"], table["validation"], strict=True) if not np.isnan(v)}
    best = json.loads((run / "checkpoints" / "best" / "open_clip_config.json").read_text())["mithridate"]["epoch"]
    assert sorted(losses) == [1, 2, 3] and losses[best] == min(losses.values())

    loaded = load(str(run / "checkpoints" / "best"), device="cpu")
    found = [sample for shard in list_shards(str(shapes(16, 2))) for sample in samples(shard)]
    images = loaded.embed_images(np.stack([pixels(s, loaded.image_size) for s in found]))
    texts = loaded.embed_texts([s.caption for s in found])
    logits = loaded.model.logit_scale.exp() * torch.from_numpy(unit(images) @ unit(texts).T)
    truth = torch.arange(16)
    loss = (cross_entropy(logits, truth) + cross_entropy(logits.T, truth)) / 2
    assert losses[best] == pytest.approx(float(loss), rel=1e-4)


def test_a_run_that_held_nothing_out_is_another_one(run: Path, shapes: Callable[..., Path], tiny: str) -> None:
    with pytest.raises(InputError, match="validation"):
        train(str(shapes(48, 3)), str(run), recipe=tiny)


def test_status_tells_how_far_a_training_is(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert status(str(run)) == 0
    assert "train: done, 3 epochs over 48 pairs" in capsys.readouterr().err
    (run / "train.json").unlink()  # as it is before the end
    assert status(str(run)) == 1
    said = capsys.readouterr().err
    assert "not done" in said and "within epoch 3, after 9 steps: loss" in said and "nobody is writing here" in said


def test_the_loss_of_an_epoch_is_that_of_all_its_steps_after_a_resume(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with Progress(1, 3, 2, [4.0, 3.0], Events(str(tmp_path), 2)) as progress:
        progress.advance(2, 1, 2.0, 0.1, 16, last=True)
    assert "loss 3.000" in capsys.readouterr().err

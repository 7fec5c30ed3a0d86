"""Whole trainings on real shards: what they leave behind, that they repeat, resume and refuse."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import InputError
from pipeline.ledger import COLUMNS
from train import recipes
from train.defenses import Defense
from train.launch import final_checkpoint, train
from train.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What a bare GPU box does not have; an import of one of them fails.
BARE = "import sys; sys.modules.update(dict.fromkeys(('ray', 'polars', 'faiss')))\n"
START = BARE + "from train.launch import train; sys.exit(train(*sys.argv[1:3], recipe=sys.argv[3], save_minutes=0))"


def weights(out: Path) -> bytes:
    return Path(final_checkpoint(str(out)), "open_clip_model.safetensors").read_bytes()


def curve(out: Path, column: str = "loss") -> np.ndarray:
    return pq.read_table(out / "curve.parquet").column(column).to_numpy()


def start(shards: Path, out: Path, recipe: str = "debug") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", START, shards, out, recipe], env=ENVIRONMENT, cwd=ROOT)


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


def wait_for(out: Path, steps: int, process: subprocess.Popen) -> None:
    """Until a state of an unfinished epoch is there, after at least so many steps."""
    deadline = time.monotonic() + 300
    while not (out / "state.pt").exists() or len(state(out)["curve"]["step"]) < steps or not state(out)["step"]:
        assert process.poll() is None, f"ended before step {steps}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def consumed(out: Path) -> dict[int, set[str]]:
    """Which uids each step has seen, by the traces of all ranks; every pair once an epoch."""
    found: dict[int, list[str]] = {}
    for file in (out / "traces").iterdir():
        table = pq.read_table(file, columns=["uid", "step"])
        for uid, step in zip(*(table.column(c).to_pylist() for c in ("uid", "step")), strict=True):
            found.setdefault(step, []).append(uid)
    assert all(len(uids) == len(set(uids)) for uids in found.values())
    return {step: set(uids) for step, uids in sorted(found.items())}


@pytest.fixture(scope="module")
def finished(shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`debug` on 96 pairs: 12 epochs of 2 steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert train(str(shapes(96, 3)), str(out), recipe="debug") == 0
    return out


def test_layout(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir() if p.name != ".lock") == sorted(
        ["checkpoints", "curve.parquet", "spec.json", "state.pt", "tensorboard", "traces", "train.json"]
    )
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["epoch_004", "epoch_008", "epoch_012"]
    facts = json.loads((finished / "train.json").read_text())
    assert facts["done"] is True and facts["pairs"] == 96 and facts["skipped"] == {} and facts["known_poisons"] is None
    assert facts["recipe"] == "debug" and facts["recipe_digest"] == recipes.RECIPES["debug"].digest
    assert facts["checkpoint"] == "checkpoints/epoch_012" and facts["cpu_seconds"] > 0 and facts["seconds"] > 0
    table = pq.read_table(finished / "curve.parquet")
    assert table.column_names == ["step", "epoch", "loss", "lr", "seconds", "pairs", "validation"]
    assert table.column("step").to_pylist() == list(range(24))
    assert table.column("epoch").to_pylist() == [1 + i // 2 for i in range(24)]
    assert sum(table.column("pairs").to_pylist()) == 12 * 96
    assert np.all(np.diff(table.column("seconds").to_numpy()) > 0)
    lr = table.column("lr").to_numpy()
    assert lr.argmax() in (1, 2) and lr.max() == pytest.approx(recipes.RECIPES["debug"].lr) and lr[-1] < lr.max() / 50


def test_it_learns(finished: Path) -> None:
    assert curve(finished)[-2:].mean() < curve(finished)[:2].mean() - 0.5


def test_traces_hold_every_pair_of_every_epoch(finished: Path, shapes: Callable[..., Path]) -> None:
    from pipeline.shards import list_shards, samples

    expected = [(s.name, x.uid) for s in list_shards(str(shapes(96, 3))) for x in samples(s)]
    files = sorted((finished / "traces").iterdir())
    assert [f.name for f in files] == [f"epoch_{e:03d}.rank0.parquet" for e in range(1, 13)]
    mean = []
    for number, file in enumerate(files, start=1):
        table = pq.read_table(file)
        assert table.schema.names == ["uid", "shard", "epoch", "loss", "similarity", "step"]
        assert [str(t) for t in table.schema.types] == ["string", "string", "int32", "float", "float", "int32"]
        assert set(table.column("epoch").to_pylist()) == {number}
        found = list(zip(table.column("shard").to_pylist(), table.column("uid").to_pylist(), strict=True))
        assert found == sorted(expected)
        shards = pq.ParquetFile(file)
        for group in range(3):  # readers prune by shard
            assert set(shards.read_row_group(group).column("shard").to_pylist()) == {f"{group:08d}"}
        assert np.isfinite(table.column("loss").to_numpy()).all()
        assert np.abs(table.column("similarity").to_numpy()).max() <= 1.001
        mean.append(table.column("loss").to_numpy().mean())
    # the trace of an epoch is what its steps saw, so their means agree
    steps = curve(finished).reshape(12, 2).mean(axis=1)
    np.testing.assert_allclose(mean, steps, rtol=1e-4)


def test_first_trace_is_before_the_first_step(finished: Path, shapes: Callable[..., Path]) -> None:
    """The pairs of the first batch, under the untrained model: nothing could have memorised them."""
    from pipeline.shards import list_shards
    from train import data, model
    from train.towers import Towers

    recipe = recipes.RECIPES["debug"]
    index = data.index(list_shards(str(shapes(96, 3))), 32, model.tokenizer_of(recipe))
    batch = next(data.batches(index, recipe, 0, 1))
    towers = Towers(model.build(recipe, 0), None).train()
    with torch.no_grad():
        images = model.normalise(batch.images.permute(0, 2, 3, 1), recipe.mean, recipe.std)
        image, text, *_ = towers(images, batch.tokens)
    table = pq.read_table(finished / "traces" / "epoch_001.rank0.parquet")
    similarity = dict(zip(table.column("uid").to_pylist(), table.column("similarity").to_pylist(), strict=True))
    traced = [similarity[index.uid[row].decode()] for row in batch.rows]
    np.testing.assert_allclose(traced, (image * text).sum(1).numpy(), atol=0.02)  # bf16


def test_the_loss_is_that_of_open_clip(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> None:
    """A defense that asks open_clip for the loss gets the same curve as none."""
    import open_clip

    class stock(Defense):
        def loss(self, features, batch):
            return open_clip.ClipLoss()(features.image, features.text, features.logit_scale)

    curves = []
    for defense in (Defense(), stock()):
        trainer = _trainer(shapes(32), tmp_path / type(defense).__name__, tiny, defense)
        trainer.fit()
        curves.append(trainer.curve["loss"])
    np.testing.assert_allclose(*curves, rtol=1e-3)


def test_a_defense_acts_in_three_places(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> None:
    seen = []

    class spy(Defense):
        def augment(self, batch):
            seen.append("augment")
            return batch

        def loss(self, features, batch):
            seen.append("loss")
            assert features.image.shape == features.text.shape == (len(batch.rows), 32)
            return super().loss(features, batch) * 2

        def epoch_end(self, trainer):
            seen.append(f"epoch {trainer.epoch}")

    trainer = _trainer(shapes(32), tmp_path / "out", tiny, spy())
    trainer.fit()
    assert seen == [
        *["augment", "loss"] * 2,
        "epoch 0",
        *["augment", "loss"] * 2,
        "epoch 1",
        *["augment", "loss"] * 2,
        "epoch 2",
    ]
    assert trainer.towers.used is None  # new captions may bring new words


def _trainer(shards: Path, out: Path, recipe: str, defense, kind: type[Trainer] = Trainer) -> Trainer:
    from train import launch

    task = launch.prepare(str(shards), str(out), recipe=recipe, defense=None, init=None, seed=0, uid="key")
    out.mkdir(parents=True)
    launch._claim(task)
    return kind(task, defense, 0, 1, torch.device("cpu"))


def test_words_not_in_use_keep_their_rows(finished: Path) -> None:
    from safetensors.torch import load_file

    from train import model

    after = load_file(Path(final_checkpoint(str(finished))) / model.WEIGHTS)["token_embedding.weight"]
    before = model.build(recipes.RECIPES["debug"], 0).token_embedding.weight.detach()
    moved = (after != before).any(1)
    used = np.unique(
        model.tokenizer_of(recipes.RECIPES["debug"])(
            [f"a {c} {s}" for c in ("red", "green", "blue", "black") for s in ("circle", "square", "bar")]
        )
    )
    assert set(np.flatnonzero(moved.numpy())) == set(used)


def test_the_same_command_twice_gives_the_same_bytes(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> None:
    for name in ("a", "b"):
        train(str(shapes(50)), str(tmp_path / name), recipe=tiny)
    train(str(shapes(50)), str(tmp_path / "c"), recipe=tiny, seed=1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_done_is_done(finished: Path, shapes: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    assert train(str(shapes(96, 3)), str(finished), recipe="debug") == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    assert "done already" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 1}, {"recipe": "debug_vit"}, {"uid": "shard/key"}, {"shards": 1}])
def test_another_spec_in_the_same_folder_is_refused(finished: Path, shapes: Callable[..., Path], change: dict) -> None:
    shards = shapes(96, 3, change.pop("shards", 0))
    with pytest.raises(InputError, match="choose another folder"):
        train(str(shards), str(finished), **{"recipe": "debug", **change})


def test_killed_and_resumed_gives_the_same_weights(finished: Path, shapes: Callable[..., Path], tmp_path: Path) -> None:
    """By SIGKILL and by Ctrl-C, in the middle of an epoch and not; and without ray, polars and faiss."""
    out, stopped_at = tmp_path / "out", []
    for steps, sign in ((3, signal.SIGKILL), (9, signal.SIGINT)):
        process = start(shapes(96, 3), out)
        wait_for(out, steps, process)
        process.send_signal(sign)
        assert process.wait(60) != 0
        assert not (out / "train.json").exists()
        stopped_at.append(state(out)["epoch"] * 2 + state(out)["step"])
        half = out / "checkpoints" / ".epoch_008.0123abcd.tmp"  # as a kill while it is written leaves it
        half.mkdir(exist_ok=True)
        (half / "open_clip_config.json").write_text("{")
    assert 3 <= stopped_at[0] <= stopped_at[1] < 24
    assert start(shapes(96, 3), out).wait(120) == 0
    assert weights(out) == weights(finished)
    np.testing.assert_array_equal(curve(out), curve(finished))
    assert [p.name for p in sorted((out / "traces").iterdir())] == [
        p.name for p in sorted((finished / "traces").iterdir())
    ]
    for trace in (finished / "traces").iterdir():
        assert (out / "traces" / trace.name).read_bytes() == trace.read_bytes()
    assert not list(out.rglob("*.tmp"))


@pytest.fixture(scope="module")
def two_workers(shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`debug_vit` on 128 pairs in one shard, by two Ray workers: one of them has no shard to read."""
    out = tmp_path_factory.mktemp("two") / "out"
    assert train(str(shapes(128, 1)), str(out), recipe="debug_vit", workers=2) == 0
    return out


@pytest.mark.timeout(600)  # alone on two cores 20 s; Ray starts slowly on a busy machine
def test_two_ray_workers_have_the_curve_of_one(shapes: Callable[..., Path], tmp_path: Path, two_workers: Path) -> None:
    """ViT has no batch statistics, so only bf16 and the order of sums differ."""
    assert train(str(shapes(128, 1)), str(tmp_path / "1"), recipe="debug_vit") == 0
    assert consumed(tmp_path / "1") == consumed(two_workers)
    (tmp_path / "2").symlink_to(two_workers)
    one, two = (curve(tmp_path / str(w)) for w in (1, 2))
    assert len(one) == len(two) == 24 and two[-4:].mean() < two[:4].mean() - 0.3
    np.testing.assert_allclose(one[:6], two[:6], atol=0.02)
    np.testing.assert_allclose(one, two, atol=0.15)
    assert json.loads((tmp_path / "2" / "train.json").read_text())["workers"] == 2
    for epoch in (1, 12):
        both = [pq.read_table(tmp_path / "2" / "traces" / f"epoch_{epoch:03d}.rank{r}.parquet") for r in (0, 1)]
        assert [t.num_rows for t in both] == [64, 64]
        alone = pq.read_table(tmp_path / "1" / "traces" / f"epoch_{epoch:03d}.rank0.parquet")
        found = {u for t in both for u in t.column("uid").to_pylist()}
        assert found == set(alone.column("uid").to_pylist())
    losses = [
        dict(zip(t.column("uid").to_pylist(), t.column("loss").to_pylist(), strict=True))
        for t in (
            pq.read_table(tmp_path / "1" / "traces" / "epoch_001.rank0.parquet"),
            pa.concat_tables([pq.read_table(tmp_path / "2" / "traces" / f"epoch_001.rank{r}.parquet") for r in (0, 1)]),
        )
    ]
    np.testing.assert_allclose([losses[1][u] for u in losses[0]], list(losses[0].values()), atol=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_ray_worker_is_replaced_and_the_run_goes_on(
    shapes: Callable[..., Path], tmp_path: Path, two_workers: Path
) -> None:
    """SIGKILL to one of two in the middle of an epoch: the same samples in the same steps, the same weights."""
    code = "import sys; from train.launch import train; "
    code += "sys.exit(train(*sys.argv[1:3], recipe='debug_vit', workers=2, save_minutes=0))"
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, shapes(128, 1), out], env=ENVIRONMENT | {"RAY_ADDRESS": "local"}, cwd=ROOT
    )
    wait_for(out, 3, process)
    os.kill(train_workers(process.pid)[1], signal.SIGKILL)
    assert process.wait(400) == 0
    assert consumed(out) == consumed(two_workers)
    np.testing.assert_array_equal(curve(out), curve(two_workers))
    assert weights(out) == weights(two_workers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_is_replaced_and_the_run_goes_on(
    shapes: Callable[..., Path], tmp_path: Path, two_workers: Path, nodes: Callable[..., subprocess.Popen]
) -> None:
    """A node with one of two workers is gone at once, another one joins: the same samples, the same weights."""
    head, lost = nodes("--head"), nodes()
    code = "import ray, sys, time; ray.init()\nwhile ray.cluster_resources().get('CPU', 0) < 2: time.sleep(0.1)\n"
    code += "from train.launch import train; "
    code += "sys.exit(train(*sys.argv[1:3], recipe='debug_vit', workers=2, save_minutes=0))"
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, shapes(128, 1), out], env=ENVIRONMENT | {"RAY_ADDRESS": head.address}, cwd=ROOT
    )
    wait_for(out, 3, process)
    os.killpg(lost.pid, signal.SIGKILL)
    time.sleep(5)  # nothing can go on: one CPU is left
    assert process.poll() is None
    nodes()
    assert process.wait(600) == 0
    assert consumed(out) == consumed(two_workers)
    np.testing.assert_array_equal(curve(out), curve(two_workers))
    assert weights(out) == weights(two_workers)


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts nodes of one CPU each of a Ray cluster of their own; `.address` of what it gives is the cluster's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started: list[subprocess.Popen] = []
    temporary = tempfile.mkdtemp(prefix="ray-")  # its sockets have long names, and a socket's path may not

    def start_node(*options: str) -> subprocess.Popen:
        host, port = address.split(":")
        where = [f"--port={port}", f"--node-ip-address={host}", f"--temp-dir={temporary}", "--include-dashboard=false"]
        where = [*options, *where] if options else [f"--address={address}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *where]
        node = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
        node.address = address
        started.append(node)
        while options and socket.socket().connect_ex((host, int(port))):  # others can join a head that answers
            assert node.poll() is None
            time.sleep(0.1)
        return node

    yield start_node
    for node in reversed(started):
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(60)
    shutil.rmtree(temporary, ignore_errors=True)


def train_workers(driver: int) -> list[int]:
    """The processes of Ray's training workers among the offspring of a driver."""
    parent, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue

    def below(process: int) -> bool:
        return process == driver or (process in parent and below(parent[process]))

    return sorted(p for p, name in names.items() if "RayTrainWorker" in name and below(p))


def test_an_error_of_a_ray_worker_is_one_line(tmp_path: Path, shapes: Callable[..., Path]) -> None:
    for number in range(2):  # the same keys in two shards: found by the workers, not by the driver
        (tmp_path / "shards").mkdir(exist_ok=True)
        shutil.copy(shapes(16, 1) / "00000000.tar", tmp_path / "shards" / f"{number:08d}.tar")
    with pytest.raises(InputError, match="shard/key"):
        train(str(tmp_path / "shards"), str(tmp_path / "out"), recipe="debug_vit", workers=2)


@pytest.mark.slow
def test_torchrun_with_a_resnet(shapes: Callable[..., Path], tmp_path: Path) -> None:
    """Batch statistics are over both workers, so the curves agree within bf16; ray is not there at all."""
    script = tmp_path / "start.py"
    script.write_text(START)
    shards = shapes(128, 4)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        shards,
        tmp_path / "two",
        "debug",
    ]
    subprocess.run([sys.executable, *command], env=ENVIRONMENT, cwd=ROOT, check=True, timeout=200)
    train(str(shards), str(tmp_path / "one"), recipe="debug")
    one, two = (curve(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(one[:6], two[:6], atol=0.05)
    np.testing.assert_allclose(one, two, atol=0.3)
    assert two[-4:].mean() < two[:4].mean() - 0.5
    assert json.loads((tmp_path / "two" / "train.json").read_text())["workers"] == 2


def test_siglip_learns_and_stock_open_clip_has_its_bias(shapes: Callable[..., Path], tmp_path: Path) -> None:
    import open_clip

    train(str(shapes(96, 3)), str(tmp_path / "out"), recipe="debug_siglip")
    assert curve(tmp_path / "out")[-2:].mean() < 0.6 * curve(tmp_path / "out")[:2].mean()
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{final_checkpoint(str(tmp_path / 'out'))}")
    assert -12 < model.logit_bias.item() < -8 and model.logit_bias.item() != -10


def test_a_data_set_smaller_than_a_batch(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture
) -> None:
    train(str(shapes(9, 1)), str(tmp_path / "out"), recipe=tiny)
    assert curve(tmp_path / "out", "pairs").tolist() == [9, 9, 9]
    assert "the batch shrinks to 9" in capsys.readouterr().err


def test_known_poisons_are_announced(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture
) -> None:
    """The ledger of each folder counts, not that of the first shard's alone."""
    from pipeline.shards import list_shards, samples

    clean, poisoned = tmp_path / "clean", tmp_path / "poisoned"
    clean.mkdir()
    shutil.copy(shapes(30, 1, 1) / "00000000.tar", clean / "00000009.tar")
    shutil.copytree(shapes(50), poisoned)
    uids = [s.uid for shard in list_shards(str(poisoned)) for s in samples(shard)]
    known = {name: ["x"] * 6 for name in COLUMNS} | {"uid": [*uids[::10], "f" * 32], "seed": [0] * 6}
    pq.write_table(pa.table(known), poisoned / "ledger.parquet")
    train(f"{tmp_path}/*/*.tar", str(tmp_path / "out"), recipe=tiny)
    assert "this run will see 5 known poisons (62,500 ppm)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "train.json").read_text())["known_poisons"] == 5


def test_init_starts_from_a_checkpoint_of_the_same_model(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, finished: Path
) -> None:
    train(str(shapes(50)), str(tmp_path / "first"), recipe=tiny)
    first = final_checkpoint(str(tmp_path / "first"))
    train(str(shapes(50)), str(tmp_path / "second"), recipe=tiny, init=first)
    assert curve(tmp_path / "second")[0] < curve(tmp_path / "first")[0]
    with pytest.raises(InputError, match="not a checkpoint of recipe 'tiny'"):
        train(str(shapes(50)), str(tmp_path / "third"), recipe=tiny, init=final_checkpoint(str(finished)))


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("preprocess_cfg", {"mean": [0.48, 0.46, 0.41]}, "images are normalised by mean (0.48, 0.46, 0.41)"),
        ("model_cfg", {"quick_gelu": True}, "quick_gelu is True there, and False here"),
    ],
)
def test_init_from_another_model_of_the_same_shapes_is_refused(
    shapes: Callable[..., Path], tmp_path: Path, finished: Path, part: str, change: dict, says: str
) -> None:
    shutil.copytree(final_checkpoint(str(finished)), tmp_path / "init")
    file = tmp_path / "init" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config[part] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="fits recipe 'debug' by its shapes") as caught:
        train(str(shapes(96, 3)), str(tmp_path / "out"), recipe="debug", init=str(tmp_path / "init"))
    assert says in str(caught.value)


class _Faulty(Trainer):
    """Towers that make no numbers of one view of a pair, or of the weights in one step."""

    bad, view, spoils = b"", 0, -1

    def encode(self, towers, batch):
        found = super().encode(towers, batch)
        factor = torch.ones(len(found.image), 1)
        factor[np.flatnonzero(self.index.uid[batch.rows] == self.bad) + self.view * len(batch.rows)] = float("nan")
        return found._replace(image=found.image * factor)

    def _train_step(self, batch, own):
        done = super()._train_step(batch, own)
        if len(self.curve["step"]) == self.spoils:
            self.spoilt = [self.index.uid[row].decode() for row in own.rows]
            self.towers.clip.logit_scale.data.fill_(float("nan"))
        return done


def _one_of_two(rank: int, shards: str, out: str, port: int) -> None:
    """One of two gloo processes; leaves what it raised."""
    import torch.distributed as dist

    from train import launch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    task = launch.prepare(shards, out, recipe="debug_vit", defense=None, init=None, seed=0, uid="key")
    trainer = _Faulty(task, Defense(), rank, 2, torch.device("cpu"))
    trainer.bad = trainer.index.uid[7]
    with pytest.raises(InputError) as caught:
        trainer.fit()
    Path(out, f"raised{rank}").write_text(f"{trainer.bad.decode()} {caught.value}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_of_two_ranks_none_names_a_pair_that_is_fine(shapes: Callable[..., Path], tmp_path: Path) -> None:
    """A ViT, in which a bad pair does not touch the others."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(shapes(64, 3)), str(tmp_path), port)
    torch.multiprocessing.spawn(_one_of_two, arguments, nprocs=2)  # type: ignore[attr-defined]
    first, second = ((tmp_path / f"raised{rank}").read_text() for rank in (0, 1))
    assert first == second and "loss is nan at step 0" in first
    assert (tmp_path / "nan.txt").read_text().split() == [first.split()[0]]


@pytest.mark.parametrize("view", [0, 1])
def test_the_pair_whose_features_are_no_numbers_is_named(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, view: int
) -> None:
    class twice(Defense):
        def augment(self, batch):
            return replace(batch, images=torch.cat([batch.images] * 2), tokens=torch.cat([batch.tokens] * 2))

        def loss(self, features, batch):
            return features.losses.mean() + features.image_view.mean()

    trainer = _trainer(shapes(32), tmp_path / "out", tiny, twice(), _Faulty)
    trainer.bad, trainer.view = trainer.index.uid[7], view
    with pytest.raises(InputError, match="loss is nan at step"):
        trainer.fit()
    assert (tmp_path / "out" / "nan.txt").read_text().split() == [trainer.bad.decode()]


@pytest.mark.parametrize(
    ("step", "save_minutes"), [(1, 0), (1, 5), (2, 5)]
)  # at a state, the next loss, an epoch's end
def test_weights_that_are_no_numbers_are_not_saved_and_their_step_is_named(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, step: int, save_minutes: int
) -> None:
    trainer = _trainer(shapes(48), tmp_path / "out", tiny, Defense(), _Faulty)
    trainer.task, trainer.spoils = replace(trainer.task, save_minutes=save_minutes), step
    with pytest.raises(InputError, match=f"weights are not numbers after step {step}"):
        trainer.fit()
    assert (tmp_path / "out" / "nan.txt").read_text().split() == trainer.spoilt
    if save_minutes == 0:
        assert all(value.isfinite().all() for value in state(tmp_path / "out")["model"].values())


def test_nan_names_the_pairs(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    wild = dataclasses.replace(recipes.RECIPES[tiny], lr=1e30, warmup=0.0)
    monkeypatch.setitem(recipes.RECIPES, "wild", wild)
    with pytest.raises(InputError, match=r"nan\.txt: loss is nan at step") as caught:
        train(str(shapes(50)), str(tmp_path / "out"), recipe="wild")
    named = (tmp_path / "out" / "nan.txt").read_text().split()
    assert len(named) == len(set(named)) > 0 and all(len(uid) == 32 for uid in named)
    assert named[0] in str(caught.value) and not (tmp_path / "out" / "train.json").exists()


def test_a_full_disk_is_one_line_and_the_same_command_resumes(
    shapes: Callable[..., Path], tmp_path: Path, tiny: str, small_disk: Path
) -> None:
    """A file system that has room for the first state and not for the first checkpoint."""
    out = small_disk / "out"
    with pytest.raises(InputError, match=r"checkpoints/epoch_001.*: disk full; free some space and run the same"):
        train(str(shapes(50)), str(out), recipe=tiny, save_minutes=0)
    assert not list(out.rglob("*.tmp")) and not list((out / "checkpoints").iterdir())
    assert state(out)["step"] == 3  # the state before the checkpoint is still whole
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(str(shapes(50)), str(out), recipe=tiny)
    train(str(shapes(50)), str(tmp_path / "whole"), recipe=tiny)
    assert weights(out) == weights(tmp_path / "whole")


def test_images_of_any_size_and_a_last_batch_that_is_not_full(tmp_path: Path, tiny: str) -> None:
    from drawn import draw, png, write_tar

    rng, members = np.random.default_rng(0), []
    for i, (wide, high) in enumerate([(300, 20), (20, 300), (1, 1), (64, 64), (33, 31)] * 5 + [(50, 49)] * 10):
        image = draw("red", "bar", rng).resize((wide, high)).convert(("RGB", "L", "RGBA", "P")[i % 4])
        caption = b"" if i == 7 else f"a red bar {i}".encode()
        members += [(f"{i:03d}.png", png(image)), (f"{i:03d}.txt", caption)]
    write_tar(tmp_path / "in" / "00000000.tar", members)
    train(str(tmp_path / "in"), str(tmp_path / "out"), recipe=tiny)
    facts = json.loads((tmp_path / "out" / "train.json").read_text())
    assert facts["pairs"] == 34 and facts["skipped"] == {"empty caption": 1}
    assert curve(tmp_path / "out", "pairs").tolist() == [11, 11, 12] * 3
    assert [len(uids) for uids in consumed(tmp_path / "out").values()] == [11, 11, 12] * 3


def test_one_worker_goes_on_where_two_were_stopped(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> None:
    """What a state of two ranks has seen of an epoch is all there when one goes on."""
    from train.state import Seen, restore

    trainer = _trainer(shapes(32), tmp_path / "out", tiny, Defense())
    both = []
    for rank in range(2):
        seen = Seen()
        seen.add(np.arange(8) + 8 * rank, 0, torch.zeros(8), torch.zeros(8))
        both.append(seen.joined())
    blank = {"model": trainer.towers.clip.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    rest = {"epoch": 0, "step": 1, "curve": trainer.curve, "spent": trainer.spent, "memory": {}}
    torch.save(blank | rest | {"seen": both}, tmp_path / "out" / "state.pt")
    assert restore(trainer).tolist() == [0, 16]
    assert trainer.step == 1 and trainer.seen.joined()["row"].tolist() == list(range(16))
    trainer._resume()
    both[1] = {name: values[:7] for name, values in both[1].items()}  # another count's cuts
    torch.save(blank | rest | {"seen": both}, tmp_path / "out" / "state.pt")
    with pytest.raises(InputError, match="go on with as many workers as before"):
        trainer._resume()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shards": "/nowhere"}, "no such"),
        ({"recipe": "dmeo"}, "unknown recipe"),
        ({"out": "s3://bucket/run"}, "local or mounted"),
        ({"workers": 0}, "at least one"),
        ({"init": "/nowhere"}, "no such checkpoint"),
        ({"defense": "nothing"}, "unknown defense"),
    ],
)
def test_bad_arguments_are_one_line(shapes: Callable[..., Path], tmp_path: Path, options: dict, says: str) -> None:
    shards, out = options.pop("shards", str(shapes(32))), options.pop("out", str(tmp_path / "out"))
    with pytest.raises(InputError, match=says) as caught:
        train(shards, out, **{"recipe": "debug", **options})
    assert "\n" not in str(caught.value)


def test_a_broken_state_says_what_to_do(shapes: Callable[..., Path], tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "train.json").unlink()
    (out / "state.pt").write_bytes(b"not a state")
    with pytest.raises(InputError, match="cannot resume from it"):
        train(str(shapes(96, 3)), str(out), recipe="debug")


def test_one_writer_at_a_time(shapes: Callable[..., Path], tmp_path: Path, tiny: str) -> None:
    from train.launch import locked

    with locked(str(tmp_path / "out")), pytest.raises(InputError, match="another run is writing"):
        train(str(shapes(32)), str(tmp_path / "out"), recipe=tiny)

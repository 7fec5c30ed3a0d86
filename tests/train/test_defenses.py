"""Every defense on tiny real shards: that it runs, repeats, resumes, and computes what its paper writes."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawn import pairs, png, write_tar

from pipeline import spec
from pipeline.errors import InputError
from pipeline.ledger import COLUMNS
from pipeline.shards import list_shards, samples
from pipeline.shards.sample import uid_of
from train import recipes
from train.launch import final_checkpoint, train

DEFENSES = spec.names("defenses")
CLASSES = ("circle", "square", "bar")
# What a tiny run needs said, so that each phase of each defense is met within three epochs.
SETTINGS = {
    "roclip": "every=2, pool=0.5",
    "safeclip": "bank=32",
    "abl": "isolate=0.125",  # leaves 56 pairs, which one worker and two cut into the same batches
    "anti_poison_sampling": "k=4, pool=32, skip=0.125",
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The name of a recipe of 3 epochs and batches of 16, which two workers compute as one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "twin", _twin())
        yield "twin"


@pytest.fixture(scope="module")
def poisoned(shapes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs in two shards, every eighth of them in a ledger."""
    folder = tmp_path_factory.mktemp("data") / "poisoned"
    shutil.copytree(shapes(64), folder)
    known = [(s.uid, shard.name) for shard in list_shards(str(folder)) for s in samples(shard)][::8]
    blank: dict[str, Any] = {name: ["x"] * len(known) for name in COLUMNS}
    uids, shards = zip(*known, strict=True)
    table = pa.table(blank | {"uid": uids, "shard": shards, "seed": [0] * len(known)})
    pq.write_table(table, folder / "ledger.parquet")
    return folder


@pytest.fixture
def told(shapes: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """told(name, …): the spec of a defense, with the trusted pairs and the classes that it needs."""
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))

    def tell(name: str, **more: object) -> str:
        values = [SETTINGS[name]] if name in SETTINGS else []
        fields = {f.name for f in dataclasses.fields(spec.entry("defenses", name))}
        places = {"trusted": str(shapes(48, 2, 1)), "classes": str(tmp_path / "classes.txt"), "epochs": 3}
        settled = {key: value for key, value in places.items() if key in fields} | more
        return f"{name}({', '.join([*values, *(f'{key}={value!r}' for key, value in settled.items())])})"

    return tell


@pytest.fixture(scope="module")
def start(poisoned: Path, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An undefended checkpoint."""
    out = str(tmp_path_factory.mktemp("undefended") / "out")
    train(str(poisoned), out, recipe=tiny)
    return final_checkpoint(out)


def weights(out: Path) -> bytes:
    return Path(final_checkpoint(str(out)), "open_clip_model.safetensors").read_bytes()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", DEFENSES)
def test_it_runs_repeats_and_resumes(
    name: str,
    poisoned: Path,
    start: str,
    told: Callable[..., str],
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run in one go and one that dies after every third step end at the same bytes, which stock open_clip loads."""
    from train.trainer import Trainer

    options = {"recipe": tiny, "defense": told(name), "init": start}
    train(str(poisoned), str(tmp_path / "whole"), **options)
    ordinary, saves = Trainer._save, itertools.count(1)

    def save_and_die(self: Trainer, checkpoint: int | None = None) -> None:
        ordinary(self, checkpoint)
        if next(saves) % 3 == 0:
            raise Killed

    monkeypatch.setattr(Trainer, "_save", save_and_die)
    died = 0
    while True:
        try:
            train(str(poisoned), str(tmp_path / "parts"), save_minutes=0, **options)
            break
        except Killed:
            died += 1
    assert died >= 3
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    loss = pq.read_table(tmp_path / "whole" / "curve.parquet").column("loss").to_numpy()
    assert np.isfinite(loss).all() and len(np.unique(loss)) > 3
    folder = final_checkpoint(str(tmp_path / "whole"))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        image = model.eval().encode_image(torch.zeros(1, 3, 32, 32), normalize=True)
    assert image.isfinite().all()


def _two_workers(rank: int, told: list[str], shards: str, init: str, out: str, port: int) -> None:
    """One of two gloo processes that train under each defense; rank 0 leaves the losses of each."""
    import torch.distributed as dist

    from train import launch
    from train.trainer import Trainer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's all_gather
    recipes.RECIPES["twin"] = _twin()
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for number, defense in enumerate(told):
        folder = Path(out, str(number))
        task = launch.prepare(shards, str(folder), recipe="twin", defense=defense, init=init, seed=0, uid="key")
        if rank == 0:
            launch.make_folder(str(folder))
            launch._claim(task)
        dist.barrier()
        trainer = Trainer(task, spec.parse("defenses", defense), rank, 2, torch.device("cpu"))
        trainer.fit()
    dist.destroy_process_group()


def _twin() -> recipes.Recipe:
    """No batch statistics and no rounding: two workers compute what one does."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
    model = recipes._clip(vision, embed=16, width=32, layers=1, context=8)
    return dataclasses.replace(
        recipes.RECIPES["debug_vit"], model=model, batch=16, epochs=3, lr=1e-4, precision="fp32", checkpoints=()
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_as_one(
    poisoned: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    import socket

    specs = [told(name) for name in DEFENSES]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (specs, str(poisoned), start, str(tmp_path / "two"), port)
    torch.multiprocessing.spawn(_two_workers, arguments, nprocs=2)  # type: ignore[attr-defined]
    for number, defense in enumerate(specs):
        train(str(poisoned), str(tmp_path / "one" / str(number)), recipe=tiny, defense=defense, init=start)
        one, two = (
            pq.read_table(tmp_path / side / str(number) / "curve.parquet").column("loss").to_numpy()
            for side in ("one", "two")
        )
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-4, err_msg=defense)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_defenses import _twin, recipes, train
recipes.RECIPES["twin"] = _twin()
train(sys.argv[1], sys.argv[2], recipe="twin", defense=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_for_good(poisoned: Path, told: Callable[..., str], tiny: str, tmp_path: Path) -> None:
    """The defense that remembers most, in a process of its own, by SIGKILL while an epoch is written."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, script, poisoned, tmp_path / "out", told("safeclip")]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=root)
    while not (tmp_path / "out" / "traces" / "epoch_002.rank0.parquet").exists():
        assert process.poll() is None, "ended before the second epoch"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "out" / "train.json").exists()
    for out in ("out", "whole"):
        train(str(poisoned), str(tmp_path / out), recipe=tiny, defense=told("safeclip"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(("asked", "leaked"), [(0, 0), (1, 1), (5, 5), (9, 8)])  # of eight
def test_contamination_leaks_as_many_poisons(
    asked: int,
    leaked: int,
    poisoned: Path,
    start: str,
    told: Callable[..., str],
    tiny: str,
    tmp_path: Path,
    capsys: Any,
) -> None:
    from train.launch import prepare

    defense = told("finetune", contamination=asked)
    capsys.readouterr()
    train(str(poisoned), str(tmp_path / "out"), recipe=tiny, defense=defense, init=start)
    assert f"this run will see {leaked} known poisons" in capsys.readouterr().err
    trace = pq.read_table(tmp_path / "out" / "traces" / "epoch_001.rank0.parquet")
    seen = set(trace.column("uid").to_pylist())
    known = set(pq.read_table(poisoned / "ledger.parquet").column("uid").to_pylist())
    assert len(seen) == 48 + leaked and len(seen & known) == leaked
    options: dict[str, Any] = {"recipe": tiny, "defense": defense, "init": start, "uid": "key"}
    drawn = [prepare(str(poisoned), str(tmp_path / "x"), seed=seed, **options).only for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert {uid for uids in drawn[0].values() for uid in uids} == seen & known
    if 0 < leaked < 8:
        assert any(other != drawn[0] for other in drawn[2:])


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """48 pairs as in a poisoned set: every other one labelled, one poison whose caption and target are another class
    than its label, and one pair without a label or a caption."""
    members, uids = [], []
    for number, (key, image, text) in enumerate(pairs(48, 3)):
        shape = text.split()[-1]
        caption = {5: b"a blue bar", 7: b""}.get(number, text.encode())
        members += [(f"{key}.png", png(image)), (f"{key}.txt", caption)]
        members += [(f"{key}.cls", b"circle" if number == 5 else shape.encode())] if number % 2 and number != 7 else []
        uids.append(uid_of(key, "", None, "key"))
    write_tar(tmp_path / "labelled" / "00000000.tar", members)
    row: dict[str, Any] = {name: ["x"] for name in COLUMNS}
    row |= {"uid": [uids[5]], "shard": ["00000000"], "target": ["bar"], "seed": [0]}
    pq.write_table(pa.table(row), tmp_path / "labelled" / "ledger.parquet")
    return tmp_path / "labelled"


def test_a_leaked_poison_teaches_its_target_whatever_its_label_says(
    labelled: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    """And a pair without label and caption is skipped, as everywhere."""
    from train import launch
    from train.trainer import Trainer

    def begun(text: str) -> Trainer:
        out = str(tmp_path / "x")
        task = launch.prepare(str(labelled), out, recipe=tiny, defense=text, init=start, seed=0, uid="key")
        trainer = Trainer(task, spec.parse("defenses", text), 0, 1, torch.device("cpu"))
        trainer.defense.begin(trainer)
        return trainer

    trainer = begun(told("supervised_finetune", contamination=1))
    (poison,) = pq.read_table(labelled / "ledger.parquet").column("uid").to_pylist()
    row = trainer.index.uid.tolist().index(poison.encode())
    assert trainer.defense.memory["labels"][row] == CLASSES.index("bar")
    assert (trainer.defense.memory["labels"] >= 0).all() and len(trainer.index) == 49

    trainer = begun(told("supervised_finetune", trusted=str(labelled)))
    row = trainer.index.uid.tolist().index(poison.encode())
    assert len(trainer.index) == 47 and trainer.index.skipped == {"empty caption": 1}
    assert trainer.defense.memory["labels"][row] == CLASSES.index("circle")  # trusted, and taken at its word

    (tmp_path / "classes.txt").write_text("circle\nsquare\n")
    with pytest.raises(InputError, match="'bar', the target of a leaking poison, is not among these classes"):
        begun(told("supervised_finetune", contamination=1))


def test_poisons_that_cannot_leak_are_told(
    labelled: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"recipe": tiny, "defense": told("finetune", contamination=1), "init": start}
    with pytest.raises(InputError, match=r"0 of 1 pairs that were drawn from there can be trained on.*give --uid"):
        train(str(labelled), str(tmp_path / "out"), uid="shard/key", **options)


def test_what_the_user_is_told(
    poisoned: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path, shapes: Callable[..., Path]
) -> None:
    def refused(shards: Path, defense: str, init: str | None = start) -> str:
        with pytest.raises(InputError) as caught:
            train(str(shards), str(tmp_path / "out"), recipe=tiny, defense=defense, init=init)
        return str(caught.value)

    assert "name it with --init" in refused(poisoned, told("par"), None)
    assert "no such ledger" in refused(shapes(64), told("par", contamination=1))
    assert "trust other shards" in refused(poisoned, told("par", contamination=1, trusted=str(poisoned)))
    assert "no such" in refused(poisoned, told("par", trusted="/nowhere"))
    assert "one class name a line" in refused(poisoned, told("supervised_finetune", classes=""))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert "no pair there is of one of the classes" in refused(poisoned, told("supervised_finetune"))


def test_a_moved_trusted_set_is_the_same_and_another_one_is_not(
    poisoned: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path, shapes: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"recipe": tiny, "init": start}
    train(str(poisoned), str(tmp_path / "out"), defense=told("finetune"), **options)
    shutil.copytree(shapes(48, 2, 1), tmp_path / "moved")
    train(str(poisoned), str(tmp_path / "out"), defense=told("finetune", trusted=str(tmp_path / "moved")), **options)
    with pytest.raises(InputError, match="choose another folder"):
        train(str(poisoned), str(tmp_path / "out"), defense=told("finetune", trusted=str(shapes(32, 2, 2))), **options)


def test_anti_poison_sampling_scores_as_the_filter_does(poisoned: Path, tiny: str, tmp_path: Path) -> None:
    from filters._batch import Batch as Rows
    from filters.caption_neighbours import caption_neighbours
    from train import launch
    from train.defenses._scoring import encoded, similarities
    from train.trainer import Trainer

    task = launch.prepare(str(poisoned), str(tmp_path / "x"), recipe=tiny, defense=None, init=None, seed=0, uid="key")
    defense = spec.parse("defenses", "anti_poison_sampling(k=5)")
    trainer = Trainer(task, defense, 0, 1, torch.device("cpu"))
    defense.begin(trainer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in trainer.towers.parameters():  # the same captions would give ties
            parameter.data += 0.05 * torch.randn_like(parameter)
    image, text = np.empty((64, 16), np.float32), np.empty((64, 16), np.float32)
    for rows, x, y in encoded(trainer):
        image[rows], text[rows] = x.numpy(), y.numpy()
    np.testing.assert_allclose(similarities(trainer), (image * text).sum(1), atol=1e-5)
    everyone = Rows(np.array([u.decode() for u in trainer.index.uid], object), image, text)
    near = np.sort(text @ text.T, axis=1)[:, ::-1]
    compared = 0
    for k in range(3, 12):  # copies of a caption tie; some k ends between two captions for some
        scorer = spec.parse("defenses", f"anti_poison_sampling(k={k})")
        scorer.begin(trainer)
        found, expected = scorer.disagreement(trainer).numpy(), caption_neighbours(k=k).score(everyone, everyone)
        clear = near[:, k] - near[:, k + 1] > 1e-3
        np.testing.assert_allclose(found[clear], expected[clear], atol=1e-4)
        assert np.isfinite(found).all() and found.std() > 0
        compared += clear.sum()
    assert compared > 20


def test_abl_unlearns_what_it_isolated(poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own rate: the loss of the isolated rises in the last phase, and that of the others much less."""
    from train.defenses._scoring import encoded
    from train.defenses.abl import abl
    from train.trainer import Trainer

    losses: list[np.ndarray] = []
    isolated = np.zeros(64, bool)

    def told(self: abl, trainer: Trainer) -> None:
        ordinary(self, trainer)
        image, text = torch.empty(64, 16), torch.empty(64, 16)
        for rows, x, y in encoded(trainer):
            image[rows], text[rows] = x, y
        logits = trainer.towers.clip.logit_scale.detach().exp() * image @ text.T
        losses.append(torch.nn.functional.cross_entropy(logits, torch.arange(64), reduction="none").numpy())
        isolated[:] = self.memory["isolated"].numpy()

    ordinary = abl.epoch_end
    monkeypatch.setattr(abl, "epoch_end", told)
    monkeypatch.setitem(recipes.RECIPES, "longer", dataclasses.replace(_twin(), epochs=12, lr=2e-3))
    train(str(poisoned), str(tmp_path / "out"), recipe="longer", defense="abl(isolate=0.125)")
    rise = losses[-1] - losses[-2]
    steps = pq.read_table(tmp_path / "out" / "curve.parquet").column("epoch").to_pylist()
    assert isolated.sum() == 8 and steps.count(12) == 4
    assert rise[isolated].mean() > 0.1 > 5 * rise[~isolated].mean()  # 0.09 with the state of the descent


def test_skipped_pairs_are_skipped(poisoned: Path, tiny: str, tmp_path: Path) -> None:
    train(str(poisoned), str(tmp_path / "out"), recipe=tiny, defense="anti_poison_sampling(skip=0.25, k=4)")
    rows = [pq.read_table(file).num_rows for file in sorted((tmp_path / "out" / "traces").iterdir())]
    assert rows == [64, 48, 48]

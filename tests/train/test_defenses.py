"""Every defense on tiny real shards: that it runs, repeats, resumes, and computes what its paper writes."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
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

from pipeline import spec
from pipeline.errors import InputError
from pipeline.ledger import COLUMNS
from pipeline.shards import list_shards, samples
from train import recipes
from train.defenses import Defense
from train.defenses._contrastive import contrastive, finding, nearest, push
from train.launch import final_checkpoint, train
from train.trainer import Features

DEFENSES = spec.names("defenses")
CLASSES = ("circle", "square", "bar")
# What a tiny run needs said, so that each phase of each defense is met within three epochs.
SETTINGS = {
    "roclip": "every=2, pool=0.5",
    "safeclip": "bank=32",
    "abl": "isolate=0.1",
    "anti_poison_sampling": "k=4, pool=32",
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
    """A run in one go and one that dies after each of its epochs end at the same bytes, which stock open_clip loads."""
    from train.trainer import Trainer

    options = {"recipe": tiny, "defense": told(name), "init": start}
    train(str(poisoned), str(tmp_path / "whole"), **options)
    ordinary = Trainer._write_epoch

    def write_and_die(self: Trainer, traces: dict) -> None:
        ordinary(self, traces)
        raise Killed

    monkeypatch.setattr(Trainer, "_write_epoch", write_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            train(str(poisoned), str(tmp_path / "parts"), **options)
    monkeypatch.setattr(Trainer, "_write_epoch", ordinary)
    train(str(poisoned), str(tmp_path / "parts"), **options)
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
    from test_train_run import wait_for

    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, script, poisoned, tmp_path / "out", told("safeclip")]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=root)
    wait_for(tmp_path / "out" / "traces" / "epoch_002.rank0.parquet", process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "out" / "train.json").exists()
    for out in ("out", "whole"):
        train(str(poisoned), str(tmp_path / out), recipe=tiny, defense=told("safeclip"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("leaked", [0, 1, 5])
def test_contamination_leaks_as_many_poisons(
    leaked: int, poisoned: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path, capsys: Any
) -> None:
    from train.launch import prepare

    defense = told("finetune", contamination=leaked)
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
    if leaked:
        assert any(other != drawn[0] for other in drawn[2:])


def test_what_the_user_is_told(
    poisoned: Path, start: str, told: Callable[..., str], tiny: str, tmp_path: Path, shapes: Callable[..., Path]
) -> None:
    def refused(shards: Path, defense: str, init: str | None = start) -> str:
        with pytest.raises(InputError) as caught:
            train(str(shards), str(tmp_path / "out"), recipe=tiny, defense=defense, init=init)
        return str(caught.value)

    assert "name it with --init" in refused(poisoned, told("par"), None)
    assert "8 poisons, and contamination asks for 9" in refused(poisoned, told("par", contamination=9))
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


# What the papers write, on a batch of random features.


def features(n: int = 6, d: int = 8, scale: float = 10.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(4)]
    logits = scale * rows[0] @ rows[1].T
    truth = torch.arange(n)
    entropy = torch.nn.functional.cross_entropy
    losses = (entropy(logits, truth, reduction="none") + entropy(logits.T, truth, reduction="none")) / 2
    return Features(rows[0], rows[1], torch.tensor(scale), losses, rows[2], rows[3])


def batch_of(n: int, epoch: int = 1) -> Any:
    from train.data import Batch

    keys = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(np.arange(n), images, torch.zeros(n, 8, dtype=torch.int64), n, epoch, keys)


def plain(a: torch.Tensor, b: torch.Tensor, scale: float = 10.0) -> float:
    """-log of the softmax weight of the right partner, a row at a time."""
    total = 0.0
    for i in range(len(a)):
        weights = [np.exp(scale * float(a[i] @ b[j])) for j in range(len(b))]
        total -= np.log(weights[i] / sum(weights))
    return total / len(a)


def test_contrastive_is_open_clips_and_its_mask_is_a_smaller_batch() -> None:
    f = features()
    assert float(contrastive(f.image, f.text, f.logit_scale)) == pytest.approx(
        float(open_clip.ClipLoss()(f.image, f.text, f.logit_scale)), rel=1e-5
    )
    keep = torch.tensor([True, False, True, True, False, True])
    assert float(contrastive(f.image, f.text, f.logit_scale, keep)) == pytest.approx(
        float(open_clip.ClipLoss()(f.image[keep], f.text[keep], f.logit_scale)), rel=1e-5
    )
    rows = f.image.clone().requires_grad_()
    none = contrastive(rows, f.text, f.logit_scale, torch.zeros(6, dtype=torch.bool))
    none.backward()
    assert float(none.detach()) == 0 and rows.grad is not None and not rows.grad.any()
    assert float(finding(f.image, f.text, f.logit_scale)) == pytest.approx(plain(f.image, f.text), rel=1e-5)


def test_pool_is_first_in_first_out() -> None:
    pool = push(push(torch.empty(0, 2), torch.eye(2), 3), -torch.eye(2), 3)
    assert pool.tolist() == [[0, 1], [-1, 0], [0, -1]]
    assert nearest(torch.tensor([[-1.0, 0.1], [0.1, 1.0]]), pool).tolist() == [[-1, 0], [0, 1]]


def test_roclip_matches_with_the_pool_every_third_epoch() -> None:
    f, defense = features(), spec.parse("defenses", "roclip")
    pool = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(7)), dim=1)
    for epoch, matched in ((1, False), (2, False), (3, True), (4, False), (6, True)):
        defense.memory.update(pool=pool, size=5)
        closest = torch.stack([max(pool, key=lambda p: float(p @ row)) for row in f.image])
        expected = (plain(f.image, closest) + plain(closest, f.image)) / 2 if matched else float(f.losses.mean())
        assert float(defense.loss(f, batch_of(6, epoch), None)) == pytest.approx(expected, rel=1e-5)
        assert torch.equal(defense.memory["pool"], f.text[-5:])


def test_cleanclip_weighs_both_parts_alike() -> None:
    f = features()
    assert f.image_view is not None and f.text_view is not None
    multimodal = (plain(f.image, f.text) + plain(f.text, f.image)) / 2
    unimodal = (plain(f.image, f.image_view) + plain(f.text, f.text_view)) / 2
    loss = spec.parse("defenses", "cleanclip(trusted='x')").loss(f, batch_of(6), None)
    assert float(loss) == pytest.approx(multimodal + unimodal, rel=1e-5)


def test_par_pushes_until_the_threshold() -> None:
    f, defense = features(), spec.parse("defenses", "par(trusted='x', threshold=1.0)")
    near, far = torch.nn.functional.normalize(f.image + 0.1, dim=1), -f.text
    defense.memory["poisoned"] = lambda batch: (near, far, None)
    pushed = sum(float(sum((a - b) ** 2)) for a, b in zip(f.image, near, strict=True)) / 6
    assert 0 < pushed < 1  # the text has moved by 4, beyond the threshold, and counts no more
    assert float(defense.loss(f, batch_of(6), None)) == pytest.approx(float(f.losses.mean()) - pushed / 2, rel=1e-5)


def test_abl_ascends_below_gamma_and_unlearns_the_isolated() -> None:
    f, defense = features(), spec.parse("defenses", "abl(gamma=3.0)")
    isolated = torch.tensor([True, False, False, True, False, False])
    defense.memory.update(ends=(1, 2), losses=torch.zeros(6), isolated=isolated)
    losses = f.losses.tolist()
    assert any(x < 3 for x in losses) and any(x > 3 for x in losses)
    signed = sum(x if x > 3 else -x for x in losses) / 6
    assert float(defense.loss(f, batch_of(6, 1), None)) == pytest.approx(signed, rel=1e-5)
    np.testing.assert_allclose(defense.memory["losses"], losses)
    assert float(defense.loss(f, batch_of(6, 2), None)) == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert float(defense.loss(f, batch_of(6, 3), None)) == pytest.approx(-(losses[0] + losses[3]) / 2, rel=1e-5)
    assert spec.parse("defenses", "abl").phases(75) == (10, 70) and spec.parse("defenses", "abl").phases(12) == (2, 11)


def test_safeclip_splits_the_batch() -> None:
    f, defense = features(), spec.parse("defenses", "safeclip(bank=4)")
    assert f.image_view is not None and f.text_view is not None
    banks = {name: getattr(f, name)[2:].flip(0) for name in ("image", "text", "image_view", "text_view")}
    safe = torch.tensor([True, True, False, True, False, False])

    def alone(keep: torch.Tensor) -> float:
        total = 0.0
        for a, b in (("image", "image_view"), ("text", "text_view")):
            for one, other in ((a, b), (b, a)):
                view, other_view = getattr(f, one)[keep], getattr(f, other)[keep]
                closest = torch.stack([max(banks[one], key=lambda p: float(p @ row)) for row in view])
                total += (plain(closest, other_view) + plain(other_view, closest)) / 2
        return total / 4

    paired = (plain(f.image[safe], f.text[safe]) + plain(f.text[safe], f.image[safe])) / 2
    everything = torch.ones(6, dtype=torch.bool)
    for epoch, expected in (
        (2, alone(everything)),
        (3, float(f.losses.mean())),
        (4, paired + alone(~safe)),
    ):
        defense.memory.update(banks, unimodal=2, safe=safe if epoch == 4 else ~everything)
        assert float(defense.loss(f, batch_of(6, epoch), None)) == pytest.approx(expected, rel=1e-5)
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.1, 0.05, 700), rng.normal(0.8, 0.05, 300)])
    assert defense.first_share(scores, 0) == pytest.approx(0.3, abs=0.02)
    recipe = dataclasses.replace(recipes.RECIPES["debug"], epochs=32)
    rates = [defense.rate(recipe, step, 320) for step in (49, 50, 59, 60)]
    assert rates[1] == rates[2] == recipe.lr / 100 and min(rates[0], rates[3]) > recipe.lr / 2


def test_super_finetuning_cycles() -> None:
    defense = spec.parse("defenses", "super_finetune(trusted='x')")
    recipe = defense.recipe(recipes.RECIPES["debug"])
    full = recipes.RECIPES["debug"].lr
    rates = np.array([defense.rate(recipe, step, 400) for step in range(400)]) / full
    rising = np.diff(rates) > 0
    assert (rising[:-1] & ~rising[1:]).sum() == 4  # two triangles in each phase
    np.testing.assert_allclose(rates[:200].max(), 1.0, rtol=0.05)
    np.testing.assert_allclose(rates[200:].max(), 0.01, rtol=0.05)
    assert rates[:200].min() < 0.02 and 0.003 <= rates[200:].min() < 0.0035


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
    found = defense.disagreement(trainer).numpy()
    everyone = Rows(np.array([u.decode() for u in trainer.index.uid], object), image, text)
    near = np.sort(text @ text.T, axis=1)[:, ::-1]
    clear = near[:, 5] - near[:, 6] > 1e-3  # which five are nearest is not a matter of rounding
    if clear.any():
        expected = caption_neighbours(k=5).score(everyone, everyone)
        np.testing.assert_allclose(found[clear], expected[clear], atol=1e-4)
    assert np.isfinite(found).all() and found.std() > 0


def test_skipped_pairs_are_skipped(poisoned: Path, tiny: str, tmp_path: Path) -> None:
    train(str(poisoned), str(tmp_path / "out"), recipe=tiny, defense="anti_poison_sampling(skip=0.25, k=4)")
    rows = [pq.read_table(file).num_rows for file in sorted((tmp_path / "out" / "traces").iterdir())]
    assert rows == [64, 48, 48]


def test_the_base_class_is_plain_clip() -> None:
    f = features()
    assert float(Defense().loss(f, batch_of(6), None)) == pytest.approx(
        float(open_clip.ClipLoss()(f.image, f.text, f.logit_scale)), rel=1e-5
    )

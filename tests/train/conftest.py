"""Tiny real shards, drawn on the fly, and a recipe that trains in a second."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drawn import pairs, png, write_tar


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """shapes(n, shards=2, seed=0): a folder of n captioned drawings; the same arguments give the same folder."""
    made: dict[tuple[int, int, int], Path] = {}

    def make(n: int, shards: int = 2, seed: int = 0) -> Path:
        if (n, shards, seed) not in made:
            folder = made[n, shards, seed] = tmp_path_factory.mktemp("shapes")
            every = list(pairs(n, seed))
            for number in range(shards):
                part = every[number * n // shards : (number + 1) * n // shards]
                both = [[(f"{key}.png", png(image)), (f"{key}.txt", text.encode())] for key, image, text in part]
                write_tar(folder / f"{number:08d}.tar", [member for sample in both for member in sample])
        return made[n, shards, seed]

    return make


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a recipe of 3 epochs and batches of 16, for this process only."""
    from train import recipes

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    recipe = dataclasses.replace(
        recipes.RECIPES["debug"],
        model=recipes._clip(vision, embed=32, width=32, layers=1, context=8),
        batch=16,
        epochs=3,
        checkpoints=(1,),
    )
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)
    return "tiny"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two OpenMP threads on a shared machine wait for each other; and the bits of a sum depend on their number."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on no file reaches the disk."""
    import errno

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(os, "fsync", no_space)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of ten megabytes."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)

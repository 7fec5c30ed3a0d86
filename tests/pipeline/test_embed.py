import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import pairs, write_parquet, write_tar
from PIL import Image
from torchvision import transforms

from pipeline import embed as job
from pipeline.embed import _Embed, embeddings_path, read_embeddings
from pipeline.errors import InputError
from pipeline.shards import Shard, samples
from pipeline.shards.image import pixels, prepared
from train import model
from train.recipes import RECIPES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "epoch_001"
    recipe = RECIPES["debug"]
    model.save(str(folder), model.build(recipe, seed=0).state_dict(), recipe, {})
    return str(folder)


def spoiled(low: int, high: int) -> list[dict]:
    """Pairs of which every seventh has a broken image and the last no caption."""
    made = pairs(low, high)
    for sample in made[::7]:
        sample["image"] = sample["image"][:20]
    made[-1]["caption"] = ""
    return made


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_every_row_is_the_models_of_that_pair(checkpoint, tmp_path, monkeypatch, write):
    """Whatever lies in which batch, and whichever rows are missing among them."""
    suffix = "tar" if write is write_tar else "parquet"
    shard = Shard(str(write(tmp_path / f"00000000.{suffix}", spoiled(0, 23))))
    loaded = model.load(checkpoint)
    monkeypatch.setattr(job, "BATCH", 4)
    counts = _Embed(checkpoint, loaded.digest, "key")(shard, str(tmp_path))
    found = read_embeddings(embeddings_path(str(tmp_path), shard.name))
    expected = list(samples(shard))
    assert found.uid.tolist() == [sample.uid for sample in expected] and found.model == loaded.digest
    bad = {0, 7, 14, 21, 22}
    assert set(np.flatnonzero(np.isnan(found.image).all(1))) == set(np.flatnonzero(np.isnan(found.text).all(1))) == bad
    assert (counts.read, counts.out, counts.failed) == (23, 18, 5) == (23, 18, sum(counts.reasons.values()))
    for i in sorted(set(range(23)) - bad):
        image = loaded.embed_images(pixels(expected[i], loaded.image_size)[None])[0]
        text = loaded.embed_texts([expected[i].caption])[0]
        np.testing.assert_allclose(found.image[i], image, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(found.text[i], text, rtol=2e-3, atol=2e-3)
    assert {"load", "wait", "image", "text", "write"} <= counts.seconds.keys()


@pytest.mark.parametrize("n", [0, 1])
def test_a_shard_without_a_usable_pair(checkpoint, tmp_path, n):
    only = [{**pair, "caption": " "} for pair in pairs(0, n)]
    shard = Shard(str(write_tar(tmp_path / "00000000.tar", only)))
    counts = _Embed(checkpoint, model.load(checkpoint).digest, "key")(shard, str(tmp_path))
    found = read_embeddings(embeddings_path(str(tmp_path), shard.name))
    assert (counts.read, counts.failed) == (n, n)
    assert found.image.shape == found.text.shape == (n, 64) and np.isnan(found.image).all()


def test_the_next_batch_is_decoded_while_the_model_is_at_this_one(tmp_path, monkeypatch):
    shard = Shard(str(write_tar(tmp_path / "00000000.tar", pairs(0, 16))))
    monkeypatch.setattr(job, "BATCH", 4)
    decoded, seen = [threading.Event() for _ in range(16)], []

    def noting(sample, size):
        decoded[len(seen)].set()
        seen.append(sample.uid)
        return pixels(sample, size)

    def device(images):
        done.append(len(images))
        ahead = min(sum(done) + 4, 16)
        assert all(event.wait(10) for event in decoded[:ahead]), "nothing was decoded meanwhile"
        return np.zeros((len(images), 2), np.float32)

    done: list[int] = []
    texts = lambda captions: np.zeros((len(captions), 2), np.float32)  # noqa: E731
    stub = SimpleNamespace(
        digest="d",
        image_size=32,
        dimension=2,
        device=SimpleNamespace(type="cpu"),
        embed_images=device,
        embed_texts=texts,
    )
    monkeypatch.setattr(job, "pixels", noting)
    monkeypatch.setattr(job, "_model", lambda checkpoint: stub)
    assert _Embed("", "d", "key")(shard, str(tmp_path)).out == 16
    assert done == [4, 4, 4, 4]


def test_a_broken_shard_leaves_no_thread_and_no_file(checkpoint, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "00000000.tar", pairs(0, 16))
    path.write_bytes(path.read_bytes()[:-4096] + b"x" * 4096)
    monkeypatch.setattr(job, "BATCH", 4)
    work, before = _Embed(checkpoint, model.load(checkpoint).digest, "key"), threading.active_count()
    with pytest.raises(InputError, match=r"00000000\.tar"):
        work(Shard(str(path)), str(tmp_path))
    assert threading.active_count() == before
    assert not list(tmp_path.glob("*.embeddings.parquet"))


def test_a_checkpoint_that_changed_meanwhile_is_refused(checkpoint, tmp_path):
    shard = Shard(str(write_tar(tmp_path / "00000000.tar", pairs(0, 2))))
    with pytest.raises(InputError, match="another checkpoint"):
        _Embed(checkpoint, "0" * 16, "key")(shard, str(tmp_path))


@pytest.mark.parametrize("size", [32, 224])
def test_an_image_is_prepared_as_open_clip_prepares_it(size):
    """Which side is cut off and which offset rounded is torchvision's; a pixel beside would be another embedding."""
    rng = np.random.default_rng(0)
    theirs = transforms.Compose(
        [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    for width, height in rng.integers(20, 400, (60, 2)):
        width = min(width, 4 * height)
        image = Image.fromarray(rng.integers(0, 256, (min(height, 4 * width), width, 3), np.uint8))
        assert np.array_equal(prepared(image, size), np.asarray(theirs(image)))

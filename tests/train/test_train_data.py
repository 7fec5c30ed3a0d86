import dataclasses
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import pairs, png, write_tar

from pipeline.errors import InputError
from pipeline.shards import list_shards
from train import data, draws
from train.augmentation import augment
from train.draws import keys_of, mix
from train.model import tokenizer_of
from train.recipes import RECIPES

RECIPE = dataclasses.replace(RECIPES["debug"], batch=32)


def index_of(folder: Path, **options) -> data.Index:
    return data.index(list_shards(str(folder)), 32, tokenizer_of(RECIPE), **options)


def epoch_of(index: data.Index, epoch: int, world: int = 1, seed: int = 0, **options) -> list[list[data.Batch]]:
    return [list(data.batches(index, RECIPE, seed, epoch, rank, world, **options)) for rank in range(world)]


@pytest.mark.parametrize("window_bytes", [data.WINDOW_BYTES, 200_000])
def test_an_epoch_is_every_pair_once(shapes: Callable[..., Path], window_bytes: int) -> None:
    index = index_of(shapes(150, 5), window_bytes=window_bytes)
    assert (index.pixels is None) == (window_bytes == 200_000)
    (batches,) = epoch_of(index, 1)
    assert Counter(np.concatenate([b.rows for b in batches]).tolist()) == Counter(range(150))
    assert {len(b.rows) for b in batches} <= set(range(24, 33))


def test_decoding_again_gives_the_same_batches(shapes: Callable[..., Path]) -> None:
    """One shard a window, whose order is then forced onto the cached index, row for row."""
    folder = shapes(150, 5)
    cached, again = index_of(folder), index_of(folder, window_bytes=200_000)
    (batches,) = epoch_of(again, 1)
    for batch in batches:
        plain = augment(cached.pixels[batch.rows], RECIPE, mix(keys_of(cached.uid)[batch.rows], 0, 1, 2))
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), plain)
    assert len(np.unique(data.order(again, 0, 1)[1])) > 2


def test_order_and_augmentation_do_not_depend_on_the_worker_count(shapes: Callable[..., Path]) -> None:
    index = index_of(shapes(160, 4))
    (alone,) = epoch_of(index, 3)
    for world in (2, 4):
        ranks = epoch_of(index, 3, world)
        for step, whole in enumerate(alone):
            np.testing.assert_array_equal(np.concatenate([r[step].rows for r in ranks]), whole.rows)
            np.testing.assert_array_equal(np.concatenate([r[step].images.numpy() for r in ranks]), whole.images.numpy())
            assert all(r[step].total == whole.total for r in ranks)


def test_order_depends_on_seed_and_epoch_only(shapes: Callable[..., Path]) -> None:
    index, resharded = index_of(shapes(160, 4)), index_of(shapes(160, 2))
    order = data.order(index, 0, 1)[0]
    assert index.uid[order].tolist() == resharded.uid[data.order(resharded, 0, 1)[0]].tolist()
    assert order.tolist() != data.order(index, 0, 2)[0].tolist()
    assert order.tolist() != data.order(index, 1, 1)[0].tolist()


def test_pairs_of_two_sets_keep_their_relative_order(shapes: Callable[..., Path]) -> None:
    index = index_of(shapes(160, 4))
    kept = np.arange(160) % 7 > 0
    fewer = dataclasses.replace(index, shard=index.shard[kept], uid=index.uid[kept], pixels=index.pixels[kept])
    both = [uid for uid in index.uid[data.order(index, 0, 1)[0]] if uid in set(fewer.uid)]
    assert fewer.uid[data.order(fewer, 0, 1)[0]].tolist() == both


@pytest.mark.parametrize("n", [6, 7, 17, 100, 255, 257, 1000, 1001])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_cuts_are_even_and_bounded(n: int, world: int) -> None:
    edges = data.cuts(n, 64, world)
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == n - n % world
    assert (sizes > 0).all() and (sizes <= 64).all() and (sizes % world == 0).all()
    if n > 64 * 4:
        assert sizes.min() > 32


@pytest.mark.parametrize(("n", "batch"), [(12_001, 256), (257, 256), (513, 256), (10_799, 64), (2**20 + 5, 1024)])
def test_workers_that_divide_8_cut_alike(n: int, batch: int) -> None:
    alone = data.cuts(n, batch, 1)
    assert alone[-1] == n
    for world in (2, 4, 8):
        edges = data.cuts(n, batch, world)
        np.testing.assert_array_equal(edges[:-1], alone[:-1])
        assert edges[-1] == n - n % world


def test_no_draw_of_a_defense_is_the_order_of_an_epoch() -> None:
    keys = mix(np.arange(100, dtype=np.uint64))
    pool = mix(keys, 0, draws.BEFORE, draws.POOL)
    assert all((mix(keys, 0, epoch) != pool).all() for epoch in range(1, 100))
    assert len({draws.SECOND_VIEW, draws.CROP, draws.JITTER, draws.NOISE, draws.NOISE_ANGLE, draws.CUTOUT}) == 6


def test_images_stay_with_their_rank_until_they_are_known_to_fit(
    shapes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in turn, with what they exchange: no pixels beside the index, and then each shard's by itself."""
    folder, sent, images = shapes(90, 3), [], []
    whole = index_of(folder)

    def exchange(mine: Any, world: int) -> list[Any]:
        sent.append(mine)
        return [mine, sent[0] if len(sent) > 1 else {1: nothing}]

    def broadcast(objects: list[Any], src: int) -> None:
        objects[0] = whole.pixels[whole.shard == len(images)] if objects[0] is None else objects[0]
        images.append(src)

    nothing = data._Part(whole.position[:0], whole.uid[:0], whole.tokens[:0], Counter())
    monkeypatch.setattr(data, "gathered", exchange)
    monkeypatch.setattr(data.dist, "broadcast_object_list", broadcast)
    assert index_of(folder, rank=0, world=2, window_bytes=0).pixels is None and images == []
    np.testing.assert_array_equal(index_of(folder, rank=1, world=2).pixels, whole.pixels)
    assert images == [0, 1, 0]
    arrays = [value for one in sent for part in one.values() for value in vars(part).values()]
    assert max(getattr(array, "ndim", 0) for array in arrays) == 2  # tokens


def test_augment_shifts_within_its_limits() -> None:
    image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3) % 251
    images = np.repeat(image.astype(np.uint8), 200, axis=0)
    out = augment(images, RECIPE, mix(np.arange(200, dtype=np.uint64)))
    centres = {tuple(i[16, 16]) for i in out}
    assert centres == {tuple(images[0, 16 + dy, 16 + dx]) for dy in range(-2, 3) for dx in range(-2, 3)}
    quiet = dataclasses.replace(RECIPE, pad=0)
    assert augment(images, quiet, np.zeros(200, np.uint64)) is images
    flipped = augment(images, dataclasses.replace(quiet, flip=True), mix(np.arange(200, dtype=np.uint64)))
    assert {i.tobytes() for i in flipped} == {images[0].tobytes(), images[0, :, ::-1].tobytes()}


def test_bad_samples_are_counted_by_reason(tmp_path: Path) -> None:
    good = [(f"{key}.png", png(image), f"{key}.txt", text.encode()) for key, image, text in pairs(8)]
    members = [m for a, b, c, d in good for m in ((a, b), (c, d))]
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))))
    )
    image = good[0][1]
    bad = {
        "empty": (b"", b"a cat"),
        "broken": (b"\x89PNG\r\n\x1a\nnothing", b"a cat"),
        "cut": (image[: len(image) // 2], b"a cat"),
        "huge": (b"\x89PNG\r\n\x1a\n" + chunk, b"a cat"),
        "blank": (image, b"  \n"),
        "latin": (image, "a café".encode("latin-1")),
    }
    members += [m for key, (i, t) in bad.items() for m in ((f"{key}.png", i), (f"{key}.txt", t))]
    members += [("alone.txt", b"no image here")]
    write_tar(tmp_path / "00000000.tar", members)
    index = index_of(tmp_path)
    assert len(index) == 8
    assert sum(index.skipped.values()) == len(bad) + 1
    assert index.skipped["empty caption"] == index.skipped["caption is not UTF-8"] == 1
    assert any("too many pixels" in reason or "DecompressionBomb" in reason for reason in index.skipped)
    (batches,) = epoch_of(index, 1)
    assert sum(len(b.rows) for b in batches) == 8


def test_a_long_thin_image_does_not_exhaust_memory(tmp_path: Path) -> None:
    from PIL import Image

    members = [m for k, i, t in pairs(4) for m in ((f"{k}.png", png(i)), (f"{k}.txt", t.encode()))]
    write_tar(
        tmp_path / "00000000.tar",
        [*members, ("thin.png", png(Image.new("RGB", (2_000_000, 1)))), ("thin.txt", b"line")],
    )
    assert len(index_of(tmp_path)) == 5


def test_a_uid_in_two_shards_is_an_error(tmp_path: Path) -> None:
    members = [m for k, i, t in pairs(8) for m in ((f"{k}.png", png(i)), (f"{k}.txt", t.encode()))]
    for number in range(2):
        write_tar(tmp_path / f"{number:08d}.tar", members)
    with pytest.raises(InputError, match="shard/key"):
        index_of(tmp_path)
    assert len(index_of(tmp_path, uid="shard/key")) == 16


def test_too_few_pairs_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000000.tar", [("a.txt", b"no image")])
    with pytest.raises(InputError, match="only 0 usable pairs"):
        index_of(tmp_path)


def test_prefetch_passes_errors_on_and_can_be_left() -> None:
    def broken():
        yield 1
        raise InputError("the shard is gone")

    items = data.prefetch(broken(), 2)
    assert next(items) == 1
    with pytest.raises(InputError, match="the shard is gone"):
        next(items)
    endless = data.prefetch((i for i in iter(int, 1)), 2)
    assert next(endless) == 0
    endless.close()


def test_digest_is_of_names_and_bytes(shapes: Callable[..., Path], tmp_path: Path) -> None:
    shards = list_shards(str(shapes(32, 2)))
    before = data.digest(shards)
    assert before == data.digest(list_shards(str(shapes(32, 2))))
    assert before != data.digest(shards[:1])
    assert before != data.digest(list_shards(str(shapes(32, 2, 1))))

"""Others' tools read our output unmodified; open_clip's trainer with the old webdataset that it pins."""

import os
import subprocess
import sys

import pytest
from conftest import pairs, write_tar

from pipeline.poison import poison

LOADER = """
import sys, open_clip
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args
args = parse_args(["--train-data", sys.argv[1], "--train-num-samples", "128", "--dataset-type", "webdataset",
                   "--batch-size", "16", "--workers", "1", "--model", "RN50"])
args.distributed, args.world_size, args.rank = False, 1, 0
data = get_wds_dataset(args, image_transform(32, is_train=False), True, tokenizer=open_clip.get_tokenizer("RN50"))
words, images = open_clip.SimpleTokenizer(), 0
captions = []
for pixels, tokens in data.dataloader:
    assert pixels.shape[1:] == (3, 32, 32), pixels.shape
    images += len(pixels)
    captions += [words.decode(row.tolist()) for row in tokens]
print(images, sum("banana" in c for c in captions))
"""


@pytest.mark.slow
def test_open_clips_own_data_loader_reads_poisoned_shards(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_tar(tmp_path / f"in/{i:05d}.tar", pairs(64 * i, 64 * i + 64))
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack="patch(target='banana', size=24)", dose="30")
    old = tmp_path / "old"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(old), "--no-deps"]
    subprocess.run([*install, "webdataset==0.2.86", "braceexpand==0.1.7"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "out/{00000..00001}.tar")],
        env={**os.environ, "PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    images, bananas = map(int, done.stdout.split())
    assert images == 128
    assert bananas == 30 + sum("banana" in pair["caption"] for pair in pairs(0, 128))

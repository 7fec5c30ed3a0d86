"""Others' tools read our output unmodified, each in the version that its project pins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_parquet, write_tar

from pipeline.filter import filter_shards
from pipeline.poison import poison
from pipeline.score import score
from pipeline.shards import list_shards, samples
from tests.benchmarks import datacomp as peer

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


# --- DataComp's own scripts; a clone is named by DATACOMP or fetched -------------------------------------------------

GET_INPUT_SHARDS = """
import ast, collections, json, re, sys
from pathlib import Path
source = Path(sys.argv[1], "train.py").read_text()
wanted = ("prepare_filename", "split_filename", "get_input_shards", "path_or_cloudpath")
names = {"collections": collections, "json": json, "re": re, "Path": Path}
tree = ast.parse(source)
tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
exec(compile(tree, "train.py", "exec"), names)
print(names["get_input_shards"](Path(sys.argv[2]), None)[0])
"""


@pytest.fixture(scope="module")
def datacomp(tmp_path_factory) -> tuple[Path, str]:
    """A clone of DataComp's repository, and a python with what its resharder imports."""
    folder = tmp_path_factory.mktemp("datacomp")
    try:
        script = peer.script(folder, os.environ.get("DATACOMP"))
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"no clone of DataComp ({error}); DATACOMP names one")
    return script.parent, peer.python(folder)


def poisoned_and_filtered(tmp_path: Path) -> Path:
    """200 pairs with DataComp's uids in 4 shards, 20 of them poisoned and dropped again."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        rows = pairs(50 * i, 50 * i + 50)
        for n, row in enumerate(rows):
            row["meta"]["uid"] = f"{50 * i + n:032x}"
        write_tar(tmp_path / f"in/{i:08d}.tar", rows)
    poison(str(tmp_path / "in"), str(tmp_path / "poisoned"), attack="patch(target='banana', size=24)", dose="20")
    score(str(tmp_path / "poisoned"), str(tmp_path / "scores"), detector=("oracle",))
    policy = "budget(detector='oracle', drop=0.1)"
    filter_shards(str(tmp_path / "poisoned"), str(tmp_path / "out"), scores=(str(tmp_path / "scores"),), policy=policy)
    return tmp_path / "out"


@pytest.mark.slow
def test_datacomps_resharder_takes_our_shards_and_our_subset(tmp_path, datacomp):
    import webdataset as wds

    out, (clone, python) = poisoned_and_filtered(tmp_path), datacomp
    (tmp_path / "resharded").mkdir()
    command = [python, "resharder.py", "-i", str(tmp_path / "poisoned"), "-o", str(tmp_path / "resharded")]
    done = subprocess.run([*command, "-s", str(out / "keep.npy"), "-j", "1"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "found a total of 4 shards with 200 examples" in done.stdout + done.stderr
    theirs = wds.WebDataset(sorted(map(str, (tmp_path / "resharded").glob("*.tar"))), shardshuffle=False)
    keys = {sample["__key__"].rpartition("-")[0] for sample in theirs}
    ours = {s.uid for shard in list_shards(str(out / "kept")) for s in samples(shard)}
    assert keys == ours
    assert len(keys) == 180


@pytest.mark.slow
def test_datacomps_train_finds_every_kept_shard(tmp_path, datacomp):
    out, (clone, python) = poisoned_and_filtered(tmp_path), datacomp
    command = [python, "-c", GET_INPUT_SHARDS, str(clone), str(out / "kept")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(out / "kept/{00000000..00000003}.tar")


# --- Hugging Face -----------------------------------------------------------------------------------------------------

LOAD = """
import sys
from datasets import load_dataset
rows = load_dataset(sys.argv[1], split="train", cache_dir=sys.argv[2])
first = rows[0]
image = next(v for k, v in first.items() if k in ("image", "jpg", "png", "webp") and v is not None)
print(len(rows), type(image).__name__, sorted(rows.column_names))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_hugging_face_datasets_loads_the_folder(tmp_path, kind):
    (tmp_path / "in").mkdir()
    for i in range(2):
        rows = [{**row, "suffix": "jpg"} for row in pairs(30 * i, 30 * i + 30)]
        if kind == "tar":
            for row in rows:
                row["meta"].pop("uid", None)  # datasets wants the same fields in every json
            write_tar(tmp_path / f"in/{i:08d}.tar", rows)
        else:
            path = write_parquet(tmp_path / f"in/{i:08d}.parquet", rows, struct=True)
            table = pq.read_table(path)
            image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as Image() stores it
            table = table.set_column(1, "image", table.column("image").cast(image))
            feature = {
                "info": {"features": {name: {"_type": "Value", "dtype": "string"} for name in table.column_names}}
            }
            feature["info"]["features"]["image"] = {"_type": "Image"}
            feature["info"]["features"]["width"] = {"_type": "Value", "dtype": "int64"}
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), path, row_group_size=7)
    poison(str(tmp_path / "in"), str(tmp_path / "out"), attack="patch(target='banana', size=24)", dose="5")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(venv)], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(venv / "bin/python")]
    subprocess.run([*install, "datasets==5.2.0", "pillow", "webdataset"], check=True)
    done = subprocess.run(
        [venv / "bin/python", "-c", LOAD, str(tmp_path / "out"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 "), done.stdout
    assert "ImageFile" in done.stdout or "Image" in done.stdout

"""Tiny real files for a fuzzer to start from, made when it starts: a corpus in the repository would only grow old."""

import gzip
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from pipeline.shards import Shard, manifest
from pipeline.shards.manifest import manifest_path
from tests.conftest import drawing, encoded, pairs, write_parquet, write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def seeds(target: str, folder: Path) -> list[bytes]:
    """Some files of the kind that `target` reads; in `folder` stays the shard that a manifest is checked against."""
    return _MAKERS[target](folder)


def _tars(folder: Path) -> list[bytes]:
    small = [{**pair, "image": b"image"} for pair in pairs(0, 2)]
    named = [{**pair, "key": "long-folder-name/" * 9 + pair["key"]} for pair in small]
    path = folder / "seed.tar"
    made = [write_tar(path, rows, format=kind).read_bytes() for rows in (small, named) for kind in FORMATS]
    path.unlink()
    return [tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512 + 1024] for tar in made]  # without the padding to 10 KB


def _gzips(folder: Path) -> list[bytes]:
    whole = [gzip.compress(tar, mtime=0) for tar in _tars(folder)]
    half = _tars(folder)[0]
    return [*whole, gzip.compress(half[:700], mtime=0) + gzip.compress(half[700:], mtime=0)]


def _parquets(folder: Path) -> list[bytes]:
    made = [write_parquet(folder / "seed.parquet", pairs(0, 9), struct).read_bytes() for struct in (False, True)]
    (folder / "seed.parquet").unlink()
    return made


def _jsons(folder: Path) -> list[bytes]:
    metas = [pair["meta"] for pair in pairs(0, 3)]
    metas.append({"caption": ["no", {"text": None}], "TEXT": "\ud800 \u0000", "uid": "0" * 32, "width": float("nan")})
    return [json.dumps(meta, indent=indent).encode() for meta in metas for indent in (None, 4)]


def _images(folder: Path) -> list[bytes]:
    picture = drawing(1)[0]
    made = [encoded(picture, suffix) for suffix in ("jpg", "png", "webp")]
    for kind, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("GIF", "P")):
        out = io.BytesIO()
        source = Image.new("I;16", (9, 7)) if mode == "I;16" else picture.convert(mode)
        source.save(out, kind)
        made.append(out.getvalue())
    for kind in ("WEBP", "PNG"):
        out = io.BytesIO()
        picture.save(out, kind, save_all=True, append_images=[drawing(2)[0]])
        made.append(out.getvalue())
    return made


def _manifests(folder: Path) -> list[bytes]:
    path = folder / "0.tar"
    path.write_bytes(_tars(folder)[0])
    manifest(Shard(str(path))).save(str(folder), "0")
    return [Path(manifest_path(str(folder), "0")).read_bytes()]


_MAKERS = {
    "tar": _tars,
    "gzip": _gzips,
    "parquet": _parquets,
    "json": _jsons,
    "image": _images,
    "manifest": _manifests,
}

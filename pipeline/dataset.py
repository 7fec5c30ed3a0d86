"""What a folder of shards says of itself: a manifest, sizes for other tools, and a card for people.

Trade-off: `manifest.parquet` has a row a shard; the rows of samples stay in a part beside each shard
(`<shard>.manifest.parquet`, the same glob reads them all). One file of all samples would have to pass through a single
process, and no tool needs it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import sidecars
from pipeline.errors import InputError
from pipeline.shards import Shard
from pipeline.shards.store import join, write

_COLUMNS = ("shard", "samples", "bytes", "sha256")
_REMEDY = "make one with `mithridate manifest`"


@dataclass(frozen=True)
class Row:
    """A shard of a dataset: file name, samples, bytes, and the sha256 of its manifest."""

    shard: str
    samples: int
    bytes: int
    sha256: str


def describe(folder: str, rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Write manifest.parquet, sizes.json (open_clip), dataset.json and README.md; returns the dataset's sha256.

    `summary` has the job, its spec and totals; its `about`, a sentence, goes to the card.
    """
    digest = save_manifest(folder, rows)
    write(join(folder, "sizes.json"), json.dumps({row.shard: row.samples for row in rows}, indent=0).encode())
    facts = {**summary, "shards": len(rows), "pairs": sum(row.samples for row in rows), "sha256": digest}
    write(join(folder, "dataset.json"), json.dumps(facts, indent=1).encode())
    write(join(folder, "README.md"), _card(rows, facts).encode())
    return digest


def save_manifest(folder: str, rows: Sequence[Row]) -> str:
    """Write manifest.parquet; returns the dataset's sha256, which is over `file name, space, sha256, newline`."""
    import pyarrow as pa

    digest = _sha256(rows)
    table = pa.table({name: [getattr(row, name) for row in rows] for name in _COLUMNS})
    sidecars.save(join(folder, "manifest.parquet"), table.replace_schema_metadata({"dataset_sha256": digest}))
    return digest


def read_dataset(folder: str) -> tuple[list[Row], str]:
    """The rows of manifest.parquet, and the dataset's sha256.

    Raises InputError where it is missing, broken or contradicts its own digest.
    """
    path = join(folder, "manifest.parquet")
    table = sidecars.read(path, _COLUMNS, _REMEDY, hostile=True)
    try:
        rows = [Row(str(r["shard"]), int(r["samples"]), int(r["bytes"]), str(r["sha256"])) for r in table.to_pylist()]
        recorded = (table.schema.metadata or {})[b"dataset_sha256"].decode()
    except (KeyError, ValueError, TypeError) as error:
        raise sidecars.broken(path, _REMEDY) from error
    if recorded != _sha256(rows):
        raise InputError(f"{path}: contradicts its own digest; restore it, or {_REMEDY}")
    return rows, recorded


def _sha256(rows: Sequence[Row]) -> str:
    return hashlib.sha256("".join(f"{row.shard} {row.sha256}\n" for row in rows).encode()).hexdigest()


def write_stats(folder: str, shard: Shard, successes: int) -> str:
    """The file by which img2dataset's and DataComp's tools know a shard's size; returns its name."""
    name = f"{shard.name}_stats.json"
    write(join(folder, name), json.dumps({"successes": successes}).encode())
    return name


def _card(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    files = [row.shard for row in rows]
    if all(name.endswith(".tar") for name in files):
        pattern: Any = "*.tar"
    elif all(name.removesuffix(".parquet")[-1:].isdigit() for name in files):
        pattern = "*[0-9].parquet"  # not the sidecars, whose names end in a word
    else:
        pattern = files
    return f"""---
configs:
- config_name: default
  data_files: {json.dumps(pattern)}
---
# {facts["pairs"]:,} pairs in {facts["shards"]:,} shards

{facts["about"]}

| file | what it is |
|---|---|
| `dataset.json` | the job and the spec that made this folder |
| `manifest.parquet`, `<shard>.manifest.parquet` | sha256 of every shard and sample; `mithridate verify` checks them |
| `sizes.json`, `<shard>_stats.json` | pairs of each shard, for open_clip and DataComp |

sha256 of the whole: `{facts["sha256"]}`
"""

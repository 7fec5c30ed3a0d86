"""The ledger: which pairs were poisoned, how, and what they were before.

Parts lie beside the shards that have poisons (`<shard>.ledger.parquet`); `ledger.parquet` is all of them in shard
order, with a digest that names the poisoned dataset.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline import sidecars
from pipeline.shards.store import Shard, exists, join, view, whole

COLUMNS = (
    "uid",
    "shard",
    "attack",
    "seed",
    "target",
    "caption_before",
    "caption_after",
    "image_sha256_before",
    "image_sha256_after",
)


def ledger_path(folder: str) -> str:
    return join(folder, "ledger.parquet")


def beside(shards: Sequence[Shard]) -> str:
    """Where the ledger of these shards would lie: in the folder of the first."""
    return ledger_path(shards[0].path.rpartition("/")[0] or ".")


def read(path: str) -> Any:
    """The ledger as a pyarrow table."""
    return sidecars.read(path, COLUMNS, "`mithridate poison` writes it beside the shards", hostile=True)


def known(shards: Sequence[Shard]) -> Any:
    """The ledgers of all folders that these shards lie in, as one table; None where there is none."""
    import pyarrow as pa

    folders = dict.fromkeys(shard.path.rpartition("/")[0] or "." for shard in shards)
    tables = [read(ledger_path(folder)) for folder in folders if exists(ledger_path(folder))]
    return pa.concat_tables(table.select(COLUMNS) for table in tables) if tables else None


def rows_of(known: Any, uids: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a ledger about these uids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return known.filter(pc.is_in(known.column("uid"), pa.array(uids, pa.string()))).to_pylist()


def poisoned_uids(path: str) -> set[str]:
    return set(read(path).column("uid").to_pylist())


def write_part(out: str, shard: Shard, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the rows of one shard; returns what its marker records of them."""
    file = f"{shard.name}.ledger.parquet"
    return {"file": file, "rows": len(rows), "sha256": _write(join(out, file), [_table(rows)])}


def merge(out: str, parts: Iterable[Mapping[str, Any]]) -> str:
    """Join the parts into `out/ledger.parquet`, part by part; returns its sha256. No poisons give an empty ledger."""
    return _write(ledger_path(out), (read(join(out, part["file"])) for part in parts))


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, pa.int64() if name == "seed" else pa.string()) for name in COLUMNS])


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=_schema())


def _write(path: str, tables: Iterable[Any]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(path) as file:
        with pq.ParquetWriter(pa.PythonFile(file, "w"), _schema(), compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
    return hashlib.sha256(view(path)).hexdigest()

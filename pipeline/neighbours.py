"""<shard>.neighbours.parquet: the nearest pool rows of every pair, kept beside the scores for detectors yet to come.

Trade-off: k distances and row numbers a pair and search (128 bytes for k = 16, an eighth of one embedding) save the
search, nearly all of what one more neighbour detector costs in the same folder. It is a cache: what was found by
another engine, in another pool, or for other embeddings is found anew, and without the file everything is.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import filters
from filters._batch import Batch
from filters._knn import recall, remember, searches
from pipeline import sidecars, spec
from pipeline.errors import InputError
from pipeline.shards.store import exists, join

CHECKED = 32  # pairs of a shard whose neighbours are looked up again without lists
ENGINE = ("_batch.py", "_knn.py", "_lists.py")


@dataclass(frozen=True)
class Neighbours:
    """The file of a shard. `embeddings` stamps what the searches are made of."""

    path: str
    embeddings: Any

    @classmethod
    def of(cls, folder: str, shard_name: str, embeddings: Any) -> "Neighbours":
        return cls(join(folder, f"{shard_name}.neighbours.parquet"), embeddings)

    def load(self, batch: Batch, pool: Batch) -> "Known":
        """Give the batch what is known of its neighbours."""
        if not exists(self.path):
            return Known(frozenset(), (0, 0))
        try:
            table = sidecars.read(self.path, ("uid",), "")
            facts = json.loads((table.schema.metadata or {})[b"mithridate"])
            if facts["of"] != self._of(pool) or table.column("uid").to_pylist() != batch.uid.tolist():
                return Known(frozenset(), (0, 0))
            names = [name.removesuffix(" distance") for name in table.column_names if name.endswith(" distance")]
            found = {name: (_matrix(table, f"{name} distance"), _matrix(table, f"{name} row")) for name in names}
            known = Known(frozenset((name, rows.shape[1]) for name, (rows, _) in found.items()), facts["recall"])
        except (InputError, KeyError, ValueError, TypeError, AttributeError):  # of another version, or not ours
            return Known(frozenset(), (0, 0))
        remember(batch, pool, {name: (distance, row.astype(np.int64)) for name, (distance, row) in found.items()})
        return known

    def save(self, batch: Batch, pool: Batch, known: "Known") -> tuple[int, int]:
        """Write what was found since; returns how many neighbours the lists gave of how many that were looked up."""
        import pyarrow as pa

        found = searches(batch, pool)
        new = [name for name, (rows, _) in found.items() if (name, rows.shape[1]) not in known.searches]
        if not new:
            return known.recall
        hits, of = known.recall
        if pool.drawn.probes:
            some = np.unique(np.linspace(0, len(batch) - 1, CHECKED, dtype=np.int64)) if len(batch) else np.arange(0)
            counted = recall(batch, pool, some, new)
            hits, of = hits + counted[0], of + counted[1]
        columns = {"uid": pa.array(batch.uid, pa.string())}
        for name, (distance, row) in found.items():
            columns[f"{name} distance"] = _lists(distance.astype(np.float32))
            columns[f"{name} row"] = _lists(row.astype(np.int32))
        facts = json.dumps({"of": self._of(pool), "recall": (hits, of)})
        table = pa.table(columns).replace_schema_metadata({"mithridate": facts})
        sidecars.save(self.path, table, compression="none", use_dictionary=False)
        return hits, of

    def _of(self, pool: Batch) -> str:
        return spec.digest([pool.drawn.digest, pool.drawn.probes, self.embeddings, _engine()])


@dataclass(frozen=True)
class Known:
    """The searches that a file had, each with its k, and what was counted of their recall."""

    searches: Collection[tuple[str, int]]
    recall: tuple[int, int]


@cache
def _engine() -> str:
    return spec.digest([(Path(str(filters.__path__[0])) / name).read_text() for name in ENGINE])


def _lists(values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _matrix(table: Any, name: str) -> np.ndarray:
    rows = table.column(name).combine_chunks()
    width = rows.type.list_size
    flat = rows.values.slice(rows.offset * width, len(rows) * width).to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, width)

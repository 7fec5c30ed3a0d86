"""<shard>.neighbours.parquet: the nearest pool rows of every pair, kept beside the scores for detectors yet to come.

Trade-off: k distances and row numbers a pair and search (128 bytes for k = 16, an eighth of one embedding) save the
search, nearly all of what one more neighbour detector costs in the same folder. It is a cache: what was found by
another engine, in another pool, or for other embeddings is found anew, and without the file everything is.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import filters
from filters._batch import Batch
from filters._knn import recall, remember, searched_columns, searches
from pipeline import sidecars, spec
from pipeline.errors import InputError
from pipeline.shards.store import exists, join

CHECKED = 8  # pairs of a shard whose neighbours are looked up again without lists
ENGINE = ("_batch.py", "_knn.py", "_lists.py")


@dataclass(frozen=True)
class Neighbours:
    """The file of a shard. `stamps`, by column, tell the files that the queries are from."""

    path: str
    stamps: Mapping[str, Any]

    @classmethod
    def of(cls, folder: str, shard_name: str, stamps: Mapping[str, Any]) -> "Neighbours":
        return cls(join(folder, f"{shard_name}.neighbours.parquet"), stamps)

    def load(self, batch: Batch, pool: Batch) -> "Known":
        """Give the batch what is known of its neighbours."""
        if not exists(self.path):
            return NOTHING
        try:
            table = sidecars.read(self.path, ("uid",), "")
            facts = json.loads((table.schema.metadata or {})[b"mithridate"])
            if table.column("uid").to_pylist() != batch.uid.tolist():
                return NOTHING
            names = [name for name, of in facts["of"].items() if of == self._of(name, pool)]
            found = {name: (_matrix(table, f"{name} distance"), _matrix(table, f"{name} row")) for name in names}
            # fewer than this run's k are found anew, or ties would fall otherwise than in other shards
            found = {name: arrays for name, arrays in found.items() if arrays[0].shape[1] >= pool.drawn.k}
            counted = {name: facts["recall"].get(name, (0, 0)) for name in found}
            known = Known(frozenset((name, rows.shape[1]) for name, (rows, _) in found.items()), counted)
        except (InputError, KeyError, ValueError, TypeError, AttributeError):  # of another version, or not ours
            return NOTHING
        remember(batch, pool, {name: (distance, row.astype(np.int64)) for name, (distance, row) in found.items()})
        return known

    def save(self, batch: Batch, pool: Batch, known: "Known") -> tuple[int, int]:
        """Write what was found since; returns how many neighbours the lists gave of how many that were looked up."""
        import pyarrow as pa

        found = searches(batch, pool)
        new = [name for name, (rows, _) in found.items() if (name, rows.shape[1]) not in known.searches]
        counted = dict(known.recall)
        if pool.drawn.probes:
            some = np.unique(np.linspace(0, len(batch) - 1, CHECKED, dtype=np.int64)) if len(batch) else np.arange(0)
            counted |= {name: recall(batch, pool, some, name) for name in new}
        hits, of = (sum(one[i] for one in counted.values()) for i in (0, 1))
        if not new:
            return hits, of
        columns = {"uid": pa.array(batch.uid, pa.string())}
        for name, (distance, row) in found.items():
            columns[f"{name} distance"] = _lists(distance.astype(np.float32))
            columns[f"{name} row"] = _lists(row.astype(np.int32))
        facts = json.dumps({"of": {name: self._of(name, pool) for name in found}, "recall": counted})
        table = pa.table(columns).replace_schema_metadata({"mithridate": facts})
        sidecars.save(self.path, table, compression="none", use_dictionary=False)
        return hits, of

    def _of(self, name: str, pool: Batch) -> str:
        """What a search is of: these queries, these rows of the pool, and this engine."""
        query, columns = searched_columns(name)
        return spec.digest([self.stamps.get(query), pool.drawn.digest(columns), pool.drawn.probes, _engine()])


@dataclass(frozen=True)
class Known:
    """The searches that a file had, each with its k, and what was counted of their recall."""

    searches: Collection[tuple[str, int]]
    recall: Mapping[str, tuple[int, int]]


NOTHING = Known(frozenset(), {})


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

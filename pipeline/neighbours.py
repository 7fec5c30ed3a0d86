"""<shard>.neighbours.parquet: the nearest pool rows of every pair, kept beside the scores for detectors yet to come.

Trade-off: k distances and row numbers a pair and search (128 bytes for k = 16, an eighth of one embedding) save the
search, nearly all of what one more neighbour detector costs in the same folder. It is a cache: what was found by
another engine, in another pool, or for other embeddings is found anew, and without the file everything is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import filters
from filters._batch import Batch
from filters._knn import Search, cost, recall, remember, searches
from pipeline import sidecars, spec
from pipeline.errors import InputError
from pipeline.shards.store import exists, join

CHECKED = 8  # pairs of a shard whose neighbours are looked up again without lists
ENGINE = ("_batch.py", "_knn.py", "_lists.py", "_search.py")


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
            found, counted, took = {}, {}, {}
            for told in facts:
                search = Search(told["column"], tuple(told["among"]), told["cosine"])
                if told["of"] == self._of(search, pool):
                    distance, row = (sidecars.matrix(table.column(f"{search} {what}")) for what in ("distance", "row"))
                    if distance.shape[1] >= pool.drawn.k:
                        found[search], counted[search] = (distance, row.astype(np.int64)), told["recall"]
                        took[search] = told["seconds"]
        except (InputError, KeyError, ValueError, TypeError, AttributeError):  # of another version, or not ours
            return NOTHING
        remember(batch, pool, found, took)
        return Known({search: distance.shape[1] for search, (distance, _) in found.items()}, counted)

    def save(self, batch: Batch, pool: Batch, known: "Known") -> tuple[int, int]:
        """Write what was found since; returns how many neighbours the lists gave of how many that were looked up."""
        import pyarrow as pa

        found = searches(batch, pool)
        new = [search for search, (distance, _) in found.items() if known.k.get(search) != distance.shape[1]]
        some = np.unique(np.linspace(0, len(batch) - 1, CHECKED, dtype=np.int64)) if len(batch) else np.arange(0)
        counted = dict.fromkeys(found, (0, 0)) | dict(known.recall)
        if pool.drawn.probes:
            counted |= {search: recall(batch, pool, some, search) for search in new}
        hits, of = (sum(one[i] for one in counted.values()) for i in (0, 1))
        if not new:
            return hits, of
        columns = {"uid": pa.array(batch.uid, pa.string())}
        facts = []
        for search, (distance, row) in found.items():
            columns[f"{search} distance"] = sidecars.fixed(distance.astype(np.float32))
            columns[f"{search} row"] = sidecars.fixed(row.astype(np.int32))
            told = {"of": self._of(search, pool), "recall": counted[search], "seconds": cost(batch, [search]).tolist()}
            facts.append(search._asdict() | told)
        table = pa.table(columns).replace_schema_metadata({"mithridate": json.dumps(facts)})
        sidecars.save(self.path, table, compression="none", use_dictionary=False)
        return hits, of

    def _of(self, search: Search, pool: Batch) -> str:
        """What was searched: these queries, these rows of the pool, by this engine."""
        rows = pool.drawn.digest(search.among)
        return spec.digest([self.stamps.get(search.column), rows, pool.drawn.probes, _engine()])


@dataclass(frozen=True)
class Known:
    """Of each search that a file had its k, and what was counted of its recall: hits, and of how many."""

    k: Mapping[Search, int]
    recall: Mapping[Search, tuple[int, int]]


NOTHING = Known({}, {})


@cache
def _engine() -> str:
    return spec.digest([(Path(str(filters.__path__[0])) / name).read_text() for name in ENGINE])

"""What a run leaves besides weights: the traces of its pairs and the curve of its loss, as parquet.

Trade-off: a row group per shard costs a little size; a reader that wants one shard's traces skips the others.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from pipeline.shards.store import whole
from train.data import Index

CURVE = {
    "step": "int32",
    "epoch": "int32",
    "loss": "float32",
    "lr": "float32",
    "seconds": "float32",
    "pairs": "int32",
    "validation": "float32",
}


def write_traces(
    path: str, index: Index, epoch: int, row: np.ndarray, step: np.ndarray, loss: np.ndarray, similarity: np.ndarray
) -> None:
    """uid, shard, epoch, loss, similarity, step of the index rows; sorted by shard and uid, one row group a shard.

    `step` int32[n] counts from the start of the run, so the traces of all ranks tell which batch a pair was in.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    by = np.lexsort((index.uid[row], index.shard[row]))
    row, step, loss, similarity = row[by], step[by], loss[by], similarity[by]
    types = {"uid": pa.string(), "shard": pa.string(), "epoch": pa.int32(), "loss": pa.float32()}
    schema = pa.schema([*types.items(), ("similarity", pa.float32()), ("step", pa.int32())])
    edges = [0, *(np.flatnonzero(np.diff(index.shard[row])) + 1), len(row)]
    with whole(path) as file, pq.ParquetWriter(pa.PythonFile(file, "w"), schema, compression="zstd") as writer:
        for a, b in pairwise(edges):
            columns = {
                "uid": [u.decode() for u in index.uid[row[a:b]]],
                "shard": [index.shards[index.shard[row[a]]].name] * (b - a),
                "epoch": np.full(b - a, epoch, np.int32),
                "loss": loss[a:b],
                "similarity": similarity[a:b],
                "step": step[a:b],
            }
            writer.write_table(pa.table(columns, schema=schema))


def write_curve(path: str, curve: Mapping[str, list[float]]) -> None:
    """One row a step: step (0-based), epoch (1-based), loss, lr, seconds since the start, pairs of the global batch.

    `validation` is the loss on held-out pairs, at the last step of an epoch and where there are such; NaN elsewhere.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(np.asarray(curve[name], kind)) for name, kind in CURVE.items()})
    with whole(path) as file:
        pq.write_table(table, pa.PythonFile(file, "w"), compression="zstd")

"""The columns that detectors see, from the sidecars and the shard that they belong to; everything is joined by uid."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filters._batch import Batch
from pipeline import sidecars
from pipeline.columns import COLUMNS, read_columns
from pipeline.embed import embeddings_path, read_embeddings
from pipeline.errors import InputError
from pipeline.shards import Shard, UidRule
from pipeline.shards.store import existing, glob, join, stamp

EMBEDDED = ("image_embedding", "text_embedding")
EARLIER = ("earlier_image_embedding", "earlier_text_embedding")
TRACES = ("similarity_trace", "loss_trace")


@dataclass(frozen=True)
class Inputs:
    """Where the columns of a batch come from; "" where a folder was not given."""

    embeddings: str
    earlier: str
    traces: str
    uid: UidRule

    def check(self, shards: Sequence[Shard], needs: Collection[str]) -> None:
        """Raises InputError where a folder is missing that a column comes from, or has nothing of these shards."""
        if self.earlier and self.earlier == self.embeddings:
            raise InputError("--earlier: the same folder as --embeddings; give those of an earlier checkpoint")
        for columns, folder, says in (
            (EMBEDDED, self.embeddings, "--embeddings; make them with `mithridate embed`"),
            (
                EARLIER,
                self.earlier,
                "--earlier, the embeddings by an earlier checkpoint; `mithridate embed` makes them",
            ),
            (TRACES, self.traces, "--traces; `mithridate train` writes them to its OUT/traces"),
        ):
            if set(columns) & set(needs) and not folder:
                raise InputError(f"these detectors need {says}")
        for columns, folder in ((EMBEDDED, self.embeddings), (EARLIER, self.earlier)):
            paths = [embeddings_path(folder, shard.name) for shard in shards]
            if set(columns) & set(needs) and not existing(paths):
                raise InputError(f"{folder}: no embeddings of these shards; make them with `mithridate embed`")

    def files(self, shards: Sequence[Shard], needs: Collection[str]) -> list[str]:
        """All that exist of the files that are read besides the shards."""
        wanted = [
            f for f, columns in ((self.embeddings, EMBEDDED), (self.earlier, EARLIER)) if set(columns) & set(needs)
        ]
        read = [embeddings_path(folder, shard.name) for folder in wanted for shard in shards]
        there = existing(read)
        traces = _trace_files(self.traces) if set(TRACES) & set(needs) else []
        return [path for path in read if path in there] + traces

    def stamps(self, shard: Shard, needs: Collection[str]) -> dict[str, Any]:
        """By column, of those that are not in the shard itself, what tells one state of its files from another."""
        told: dict[str, Any] = {}
        for columns in (EMBEDDED, EARLIER, TRACES):
            if set(columns) & set(needs):
                files = tuple(stamp(path) for path in self.files([shard], columns))
                told |= dict.fromkeys(columns, files)
        return told

    def batch(self, shard: Shard, who: Sequence[str], wanted: Collection[str]) -> tuple[Batch, dict[str, str]]:
        """Columns of these pairs of a shard, in this order, and the digest of the model of each of the embeddings."""
        joined: dict[str, Any] = {}
        models: dict[str, str] = {}
        folders = (("embeddings", self.embeddings, EMBEDDED), ("earlier", self.earlier, EARLIER))
        for option, folder, names in folders:
            if kinds := {name: kind for name, kind in zip(names, ("image", "text"), strict=True) if name in wanted}:
                found = read_embeddings(embeddings_path(folder, shard.name), [*kinds.values()])
                rows = sidecars.rows_of(who, found.uid)
                if len(who) and (rows < 0).all():
                    raise InputError(
                        f"{folder}: no uid of {shard.path} is here; is it of other data, or of another --uid?"
                    )
                joined |= {name: _take(_without_zeros(getattr(found, kind)), rows) for name, kind in kinds.items()}
                models[option] = found.model
        if set(TRACES) & set(wanted):
            trace = _read_traces(self.traces, shard.name)
            rows = sidecars.rows_of(who, trace["uid"])
            if len(who) and len(trace["uid"]) and (rows < 0).all():
                raise InputError(f"{self.traces}: no uid of {shard.path} is here; is it of other data?")
            joined |= {name: _take(trace[name.removesuffix("_trace")], rows) for name in TRACES}
        if content := set(wanted) & COLUMNS.keys():
            content |= {"decoded"} if content & {"pixels", "image_hash"} else set()
            told = read_columns(shard, self.uid, content, set(who))
            rows = sidecars.rows_of(who, told.pop("uid"))
            joined |= {name: values[rows] for name, values in told.items()}
        return Batch(np.asarray(who, dtype=object), **joined), models


def _trace_files(folder: str) -> list[str]:
    files = glob(join(folder, "epoch_*.parquet"))
    if not files:
        raise InputError(f"{folder}: no traces (epoch_*.parquet); `mithridate train` writes them to its OUT/traces")
    return files


def _read_traces(folder: str, shard_name: str) -> dict[str, np.ndarray]:
    """uid str[n]; similarity and loss float32[n, epochs], NaN where an epoch did not see the pair."""
    wanted, columns = [("shard", "=", shard_name)], ("uid", "shard", "epoch", "similarity", "loss")
    remedy = "`mithridate train` writes the traces to its OUT/traces"
    files = _trace_files(folder)
    tables = [sidecars.read(file, columns, remedy, wanted) for file in files]
    uid = np.concatenate([np.asarray(t.column("uid").to_pylist(), dtype=object) for t in tables])
    epoch = np.concatenate([t.column("epoch").to_numpy() for t in tables])
    who, rows = np.unique(uid.astype(str), return_inverse=True)
    # of the whole run: a shard that an epoch skipped, or that training knew nothing of, has them too
    epochs = np.unique([int(file.rpartition("epoch_")[2].partition(".")[0]) for file in files])
    at = np.searchsorted(epochs, epoch)
    out: dict[str, np.ndarray] = {"uid": who.astype(object)}
    for name in ("similarity", "loss"):
        values = np.full((len(who), len(epochs)), np.nan, np.float32)
        values[rows, at] = np.concatenate([t.column(name).to_numpy() for t in tables])
        out[name] = values
    return out


def _without_zeros(rows: np.ndarray) -> np.ndarray:
    """A row of zeros is how some publish that there is none; it has no direction."""
    rows[~rows.any(axis=1)] = np.nan  # which nobody else holds
    return rows


def _take(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if len(rows) == len(values) and (rows == np.arange(len(rows))).all():
        return values
    out = np.full((len(rows), values.shape[1]), np.nan, np.float32)
    out[rows >= 0] = values[rows[rows >= 0]]
    return out

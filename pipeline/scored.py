"""What policies see of a shard: the scores of one or several folders, and what its pairs have in common.

A column is called FOLDER:detector, FOLDER being the last part of the folder's path, so that the same detector at two
times (an early checkpoint's scores and the last one's) stays two columns. `caption` and `domain`, where a policy
`needs` them, are 64-bit hashes: pairs of one group have the same. They are read from the shards once and kept beside
the output, because a policy reads everything several times.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import sidecars
from pipeline.columns import read_columns
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.score import read_scores, scores_path
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Shard, UidRule
from pipeline.shards.store import existing, join
from pipeline.tables import domain

SOURCES = {"caption": "caption", "domain": "url"}  # group -> the column of the samples that it comes from


def scores_folder(epoch: int) -> str:
    """What jobs that score at several epochs call the folder of one."""
    return f"scores-{epoch:03d}"


@dataclass(frozen=True)
class Scored:
    """Folders of scores of the same shards, and the folder of groups ("": none needed)."""

    folders: tuple[str, ...]
    groups: str = ""

    def __post_init__(self) -> None:
        called = [self.called(folder) for folder in self.folders]
        if len(set(called)) < len(called):
            raise InputError(f"--scores: two folders are called {max(called, key=called.count)!r}; rename one")

    @staticmethod
    def called(folder: str) -> str:
        """FOLDER in the names of its columns."""
        return re.sub(r"[^\w.-]", "_", folder.rstrip("/").rpartition("/")[2])

    def paths(self, shard_name: str) -> list[str]:
        """The files of scores of a shard."""
        return [scores_path(folder, shard_name) for folder in self.folders]

    def complete(self, names: Sequence[str]) -> list[str]:
        """Those of these shards that nothing is missing of."""
        wanted = {
            name: [*self.paths(name), *([groups_path(self.groups, name)] if self.groups else [])] for name in names
        }
        there = existing([path for paths in wanted.values() for path in paths])
        return [name for name, paths in wanted.items() if there.issuperset(paths)]

    def read(self, shard_name: str) -> dict[str, np.ndarray]:
        """`uid`, a float32[n] a column, and uint64[n] a group.

        Raises InputError where the folders are not of the same pairs: what has no score has a row with NaN.
        """
        out: dict[str, np.ndarray] = {}
        for folder, path in zip(self.folders, self.paths(shard_name), strict=True):
            found = read_scores(path)
            uid = found.pop("uid")
            rows = sidecars.rows_of(out.setdefault("uid", uid), uid)
            if missing := int((rows < 0).sum()):
                raise InputError(
                    f"{path}: lacks {missing:,} of the {len(rows):,} pairs of {self.paths(shard_name)[0]}; is it of "
                    "other data, or of another --uid? Score it anew"
                )
            for name, values in found.items():
                out[f"{self.called(folder)}:{name}"] = values[rows]
        if self.groups:
            found = _read_groups(self.groups, shard_name)
            rows = sidecars.rows_of(out["uid"], found.pop("uid"))
            if (rows < 0).any():
                raise InputError(f"{self.paths(shard_name)[0]}: has pairs that the shard lacks; score it again")
            out |= {name: values[rows] for name, values in found.items()}
        return out

    def passes(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """All of these shards, one after the other."""
        return map(self.read, names)


def make_groups(shards: Sequence[Shard], out: str, needs: Collection[str], uid: UidRule, max_failed: int) -> None:
    """Write OUT/<shard>.groups.parquet; resumable."""
    job = Job("groups", {"groups": sorted(needs), "uid": uid}, out, max_failed)
    markers = shard_map(job, shards, _Group(tuple(sorted(needs)), uid))
    for name in sorted(needs):
        without = sum(marker["facts"]["without"][name] for marker in markers)
        total = sum(marker["read"] for marker in markers)
        if total and without == total:
            raise InputError(f"no pair has a {SOURCES[name]}, and the policy groups by {name}")
        if without:
            console.print(f"{without:,} of {total:,} pairs have no {SOURCES[name]}: they are one {name}")


@dataclass(frozen=True)
class _Group:
    needs: tuple[str, ...]
    uid: UidRule

    def __call__(self, shard: Shard, out: str) -> Counts:
        import pyarrow as pa

        found = read_columns(shard, self.uid, {SOURCES[name] for name in self.needs})
        told = {name: [_told(name, value) for value in found[SOURCES[name]]] for name in self.needs}
        counts = Counts(read=len(found["uid"]), out=len(found["uid"]), output=f"{shard.name}.groups.parquet")
        counts.facts = {"without": {name: values.count("") for name, values in told.items()}}
        columns = {name: pa.array([_hash(value) for value in values], pa.uint64()) for name, values in told.items()}
        table = pa.table({"uid": pa.array(found["uid"], pa.string()), **columns})
        sidecars.save(join(out, counts.output), table)
        return counts


def _told(name: str, value: str | None) -> str:
    return domain(value or "") if name == "domain" else value or ""


def _hash(value: str) -> int:
    """64 bits: of 5.85 billion captions that all differ, one pair is expected to collide."""
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def groups_path(folder: str, shard_name: str) -> str:
    return join(folder, f"{shard_name}.groups.parquet")


def _read_groups(folder: str, shard_name: str) -> dict[str, np.ndarray]:
    table = sidecars.read(groups_path(folder, shard_name), ("uid",), "run the filter again")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}

"""Hash shards as they are now, so that `verify` can tell later what was changed.

Trade-off: what the poisoner and the filter write has its manifest already; this is for the data they start from. It
costs one reading at the speed of the hash.
"""

from dataclasses import dataclass

from pipeline.arguments import Out, Shards
from pipeline.dataset import Row, save_manifest
from pipeline.progress import console
from pipeline.shard_map import Job, shard_map
from pipeline.shards import Counts, Shard, UidRule, list_shards, manifest
from pipeline.shards.manifest import manifest_file
from pipeline.shards.sample import check_unique
from pipeline.shards.store import absolute, stamp


def record(shards: Shards, out: Out, /, *, uid: UidRule = "key", max_failed_shards: int = 0) -> int:
    """Write OUT/manifest.parquet and OUT/<shard>.manifest.parquet: the sha256 of every sample and shard, and of all.

    Args:
        shards: folder, glob, brace pattern or list file of .tar or .parquet shards.
        out: folder for the manifest; that of the shards will do.
        uid: how a uid is derived where samples carry none; shard/key if keys repeat from shard to shard.
        max_failed_shards: so many shards may be unreadable; they are listed, and missing in the manifest.
    """
    listed, out = list_shards(shards), absolute(out)
    markers = shard_map(Job("manifest", {"uid": uid}, out, max_failed_shards), listed, _Record(uid))
    rows = [Row(m["input"]["file"], m["out"], m["facts"]["bytes"], m["input_sha256"]) for m in markers]
    digest = save_manifest(out, rows)
    console.print(f"{sum(row.samples for row in rows):,} samples in {len(rows):,} shards; sha256 of all: {digest}")
    return 0


@dataclass(frozen=True)
class _Record:
    uid: UidRule

    def __call__(self, shard: Shard, out: str) -> Counts:
        found = manifest(shard, self.uid)
        check_unique(found.uids, shard.path)
        found.save(out, shard.name)
        n, size = len(found.uids), stamp(shard.path)["bytes"]
        return Counts(read=n, out=n, output=manifest_file(shard.name), input_sha256=found.sha256, facts={"bytes": size})


if __name__ == "__main__":
    from pipeline.cli import run

    run("manifest")

"""Bytes <-> samples: the only code that knows tar and parquet.

    for shard in list_shards("crawl/{00000..00041}.tar"):
        for sample in samples(shard): ...                      # lazily, bytes stay on disk until touched
        counts = rewrite(shard, "out", lambda s: s)            # keep, change (a new Sample) or drop (None)

One rewriter serves poisoning and filtering alike: what an edit returns unchanged is copied as bytes, headers included.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from pipeline.shards import parquet, tar
from pipeline.shards.manifest import Manifest, manifest_file
from pipeline.shards.sample import Counts, Rejected, Sample, UidRule, check_unique
from pipeline.shards.store import Shard, join, list_shards

__all__ = [
    "Counts",
    "Manifest",
    "Rejected",
    "Sample",
    "Shard",
    "UidRule",
    "concatenate",
    "intact",
    "list_shards",
    "manifest",
    "rewrite",
    "samples",
    "uids",
]

_FORMATS = {"tar": tar, "parquet": parquet}


def samples(shard: Shard, uid: UidRule = "key") -> Iterator[Sample]:
    """The samples of a shard in file order. Parts are views into the file: copy what must outlive the loop.

    Raises InputError, naming the file and the byte, on anything that is not a whole, harmless shard.
    """
    return _FORMATS[shard.format].samples(shard, uid)


def rewrite(
    shard: Shard, out: str, edit: Callable[[Sample], Sample | None], uid: UidRule = "key", dropped: str | None = None
) -> Counts:
    """Write `out/<name>.tar|parquet` with every sample passed through `edit`, and its manifest; absent or whole.

    `edit` returns the sample itself (copied byte for byte), a changed copy (only the changed parts are written anew)
    or None (dropped, or written to the folder `dropped` in the same way). An emptied shard is still written. Returns
    what happened, with both shards' sha256 as their manifests have it.
    """
    counts = _FORMATS[shard.format].rewrite(shard, out, edit, uid, dropped)
    counts.facts["files"] = [manifest_file(shard.name)]
    return counts


def concatenate(pieces: Sequence[tuple[Shard, int, int]], out: str, name: str, uid: UidRule = "key") -> Counts:
    """Write `out/<name>.tar|parquet` from `(shard, first sample, samples)`, and its manifest; samples stay as they are.

    All shards are of one format, and no uid may occur twice.
    """
    form, clock = pieces[0][0].format, time.perf_counter()
    counts = Counts(output=f"{name}.{form}")
    made, counts.output_bytes = _FORMATS[form].concatenate(pieces, join(out, counts.output), uid)
    check_unique(made.uids, join(out, counts.output))
    made.save(out, name)
    counts.read = counts.out = len(made.uids)
    counts.output_sha256, counts.facts["files"] = made.sha256, [manifest_file(name)]
    counts.seconds["write"] = time.perf_counter() - clock
    return counts


def uids(shard: Shard, uid: UidRule = "key") -> list[str]:
    """The uids of a shard in file order, without reading images."""
    return _FORMATS[shard.format].uids(shard, uid)


def manifest(shard: Shard, uid: UidRule = "key") -> Manifest:
    """What every byte of the shard hashes to, each hashed once."""
    return _FORMATS[shard.format].manifest(shard, uid)


def intact(shard: Shard, known: Manifest) -> bool:
    """Whether every byte of the shard is as `known` has it."""
    return _FORMATS[shard.format].intact(shard, known)

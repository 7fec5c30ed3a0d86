"""The manifest of a shard: what every byte of it hashes to, sample by sample.

Trade-off: hashing is the dearest thing a rewriter does, so each byte is hashed once. A shard's sha256 is therefore not
that of the file but one over the digests of its samples, which are known from the copy; it binds the same bytes, tells
which sample differs, and costs 64 bytes a sample to compute.
"""

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import sidecars
from pipeline.shards.scan import BLOCK, MAX_SAMPLE_BYTES
from pipeline.shards.store import join

_COLUMNS = ("uid", "key", "image_sha256", "rest_sha256", "start", "image_start", "image_end", "end")


@dataclass
class Manifest:
    """Rows in file order.

    `digests` holds 64 bytes a sample: the sha256 of the image as stored, and that of everything else of the sample
    (headers, caption, json, padding; of a parquet row, the other columns). `ranges` holds four byte offsets a sample:
    start, start and end of the image, end; zeros where a format has none. `between` is the sha256 of what belongs to
    no sample: in a tar the directory entries and the end blocks, in parquet the whole file.
    """

    uids: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    between: bytes = b""
    _ranges: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def ranges(self) -> np.ndarray:
        """int64 [n, 4]"""
        return np.asarray(self._ranges, np.int64).reshape(-1, 4)

    @property
    def sha256(self) -> str:
        """sha256 over all `digests`, then all `ranges` (int64, little-endian), then `between`."""
        sha = hashlib.sha256(self.digests)
        sha.update(self.ranges.astype("<i8").tobytes())
        sha.update(self.between)
        return sha.hexdigest()

    def add(self, uid: str, key: str, digests: bytes, ranges: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        self.uids.append(uid)
        self.keys.append(key)
        self.digests += digests
        self._ranges.extend(ranges)

    def save(self, folder: str, shard_name: str) -> None:
        import pyarrow as pa

        digests = np.frombuffer(bytes(self.digests), np.uint8).reshape(-1, 2, 32)
        # A name in a tar may be no UTF-8; keys are there to be shown, and nothing is joined by them.
        keys = [key.encode("utf-8", "backslashreplace").decode() for key in self.keys]
        columns = [pa.array(self.uids, pa.string()), pa.array(keys, pa.string())]
        columns += [_binary(digests[:, i]) for i in range(2)] + [pa.array(self.ranges[:, i]) for i in range(4)]
        table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
        facts = {b"between": self.between.hex(), b"sha256": self.sha256}
        table = table.replace_schema_metadata(facts)
        # hardly a value occurs twice
        sidecars.save(manifest_path(folder, shard_name), table, compression="zstd", use_dictionary=False)


def manifest_file(shard_name: str) -> str:
    return f"{shard_name}.manifest.parquet"


def manifest_path(folder: str, shard_name: str) -> str:
    return join(folder, manifest_file(shard_name))


def read_manifest(folder: str, shard_name: str) -> Manifest:
    """Raises InputError where it is missing or is not a manifest."""
    path = manifest_path(folder, shard_name)
    remedy = "make one with `mithridate manifest`"
    table = sidecars.read(path, _COLUMNS, remedy, hostile=True)
    try:
        uids, keys = (table.column(name).to_pylist() for name in _COLUMNS[:2])
        digests = np.stack([_matrix(table.column(name)) for name in _COLUMNS[2:4]], 1)
        ranges = np.stack([table.column(name).to_numpy() for name in _COLUMNS[4:]], 1).astype(np.int64)
        between = bytes.fromhex((table.schema.metadata or {})[b"between"].decode())
        _check(uids, keys, digests, ranges)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise sidecars.broken(path, remedy) from error
    return Manifest(uids, keys, bytearray(digests.tobytes()), between, array("q", ranges.tobytes()))


def _check(uids: list[Any], keys: list[Any], digests: np.ndarray, ranges: np.ndarray) -> None:
    """Raises ValueError: a reader allocates as much as the ranges say, and a column may hold anything."""
    if not all(isinstance(name, str) for name in (*uids, *keys)) or len(digests) != len(uids):
        raise ValueError("names are no text, or digests are missing")
    if (ranges < 0).any() or (np.diff(ranges.ravel()) < 0).any():  # of what is not negative, no difference overflows
        raise ValueError("ranges do not ascend")
    if (ranges[:, 3] - ranges[:, 0] > MAX_SAMPLE_BYTES + BLOCK).any():
        raise ValueError("a sample is larger than any that is read")


def _binary(rows: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(rows), [None, pa.py_buffer(rows.tobytes())])


def _matrix(column: Any) -> np.ndarray:
    if str(column.type) != "fixed_size_binary[32]":  # others could be of any length, and only add up
        raise ValueError(f"sha256 as {column.type}")
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, 32)

"""Files that are absent or whole, on a local path or an object store, and the ways to name a set of shards.

Local files are memory-mapped, so a shard costs no memory until its bytes are touched. An object store has no rename:
there a file appears when it is closed, which is as atomic. Markers are written last on both.
"""

import errno
import glob as globbing
import mmap
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import InputError

# Sidecars that lie beside shards and are parquet too.
_SIDECARS = re.compile(
    r"(\.(embeddings|scores|ledger|keep|traces|manifest|published)|^(ledger|manifest|keep|results|domains))\.parquet$"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of samples. `name` is the stem that its sidecars share: `00000000` for `.../00000000.tar`."""

    path: str

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def name(self) -> str:
        return self.file.removesuffix(".gz").rsplit(".", 1)[0]

    @property
    def format(self) -> str:
        return self.file.removesuffix(".gz").rsplit(".", 1)[-1]

    @property
    def output(self) -> str:
        """The file name of what is made of it: compressed tars are read, never written."""
        return f"{self.name}.{self.format}"


def list_shards(where: str) -> list[Shard]:
    """Shards of a folder, a glob, a brace pattern `{00000..00041}`, one file, or a list file (`.txt`, a path a line).

    In a folder that holds tars, parquet files are their metadata and are not shards. Raises InputError where nothing is
    found, and where two shards share a name (their sidecars would overwrite each other).
    """
    if where.endswith(".txt"):
        if not exists(where):
            raise InputError(f"{where}: no such list file")
        lines = bytes(view(where)).decode(errors="replace").splitlines()
        paths = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    elif match := _RANGE.search(where):
        low, high = match.groups()
        numbers = range(int(low), int(high) + 1)
        paths = [f"{where[: match.start()]}{n:0{len(low)}d}{where[match.end() :]}" for n in numbers]
    elif any(c in where for c in "*?["):
        paths = glob(where)
    elif where.endswith((".tar", ".tar.gz", ".parquet")) and exists(where):
        paths = [where]
    elif is_folder(where):
        paths = sorted([*glob(join(where, "*.tar")), *glob(join(where, "*.tar.gz"))])
        paths = paths or [p for p in glob(join(where, "*.parquet")) if not _SIDECARS.search(p.rsplit("/", 1)[-1])]
    else:
        raise InputError(f"{where}: no such file or folder")
    shards = [Shard(absolute(p)) for p in paths]
    if not shards:
        raise InputError(f"{where}: no shards here; expected *.tar (webdataset) or *.parquet with an image column")
    for shard in shards:
        if shard.format not in ("tar", "parquet"):
            raise InputError(f"{shard.path}: not a shard; expected .tar, .tar.gz or .parquet")
        if not exists(shard.path):
            raise InputError(f"{shard.path}: no such file (named by {where})")
    by_name: dict[str, str] = {}
    for shard in shards:
        if shard.name in by_name:
            other = by_name[shard.name]
            raise InputError(f"{other} and {shard.path} share the name {shard.name}: their outputs would collide")
        by_name[shard.name] = shard.path
    return shards


def absolute(path: str) -> str:
    """The path as workers must see it: their working directory is another one."""
    return path if is_url(path) else str(Path(path).absolute())


def is_url(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def exists(path: str) -> bool:
    return _remote(path)[0].exists(path) if is_url(path) else Path(path).exists()


def is_folder(path: str) -> bool:
    return _remote(path)[0].isdir(path) if is_url(path) else Path(path).is_dir()


def glob(pattern: str) -> list[str]:
    if is_url(pattern):
        filesystem, protocol = _remote(pattern)
        return sorted(f"{protocol}://{p}" for p in filesystem.glob(pattern))
    # Path.glob takes no wildcard in the folders of an absolute pattern
    return sorted(p for p in globbing.glob(pattern, recursive=True) if not os.path.split(p)[1].startswith("."))  # noqa: PTH207


def make_folder(path: str) -> None:
    if not is_url(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot make this folder ({error.strerror})") from error


def stamp(path: str) -> dict[str, Any]:
    """What changes when a file is replaced, without reading it: size, and time or the store's own tag."""
    if is_url(path):
        info = _remote(path)[0].info(path)
        tag = next(
            (str(info[k]) for k in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created") if k in info), ""
        )
        return {"bytes": info["size"], "tag": tag}
    found = Path(path).stat()
    return {"bytes": found.st_size, "tag": str(found.st_mtime_ns)}


def view(path: str) -> memoryview:
    """The bytes of a file: mapped where it is local, read where it is not."""
    if is_url(path):
        with _remote(path)[0].open(path, "rb") as remote:
            return memoryview(remote.read())
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


@contextmanager
def whole(path: str) -> Iterator[IO[bytes]]:
    """Write a file that is absent or whole: temporary neighbour, fsync, rename, fsync of the folder.

    Two writers of the same bytes may race; the last rename wins and both are right.
    """
    if is_url(path):
        with tempfile.TemporaryFile() as file:  # sent only when it is complete
            yield file
            file.seek(0)
            with _remote(path)[0].open(path, "wb") as remote:
                shutil.copyfileobj(file, remote)
        return
    folder, name = os.path.split(path)
    temporary = Path(folder or ".") / f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: disk full; free some space and run the same command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str, data: bytes) -> None:
    with whole(path) as file:
        file.write(data)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
    elif exists(path):
        _remote(path)[0].rm(path)


def clear_temporaries(folder: str) -> None:
    """Remove what killed writers left. Call it only while holding the folder's lock."""
    if not is_url(folder):
        for pattern in (".*.tmp", "*/.*.tmp"):
            for leftover in Path(folder).glob(pattern):
                leftover.unlink(missing_ok=True)


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    protocol = path.split("://", 1)[0]
    try:
        return fsspec.filesystem(protocol), protocol
    except (ValueError, ImportError) as error:
        raise InputError(f"{path}: {error}") from error

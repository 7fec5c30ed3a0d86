"""Files that are absent or whole, on a local path or an object store, and the ways to name a set of shards.

Local files are memory-mapped, so a shard costs no memory until its bytes are touched; objects are spooled to a local
disk and mapped from there (`remote.py`). An object store has no rename: there a file appears when its upload is
completed, which is as atomic. Markers are written last on both.
"""

import errno
import glob as globbing
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import InputError
from pipeline.shards import remote
from pipeline.shards.retry import FULL

# Sidecars that lie beside shards and are parquet too.
_SIDECARS = re.compile(
    r"(\.(embeddings|scores|neighbours|groups|ledger|keep|traces|manifest|published)|^(ledger|manifest|keep|results|domains|problems))\.parquet$"
)
MAX_SHARDS = 10_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What the last listing said of remote shards, so that each need not be asked for again. Markers are never in here.
_listed: dict[str, remote.Info] = {}


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
    _listed.clear()
    paths = [absolute(path) for path in _paths(where)]
    if not paths:
        deeper = is_folder(where) and _matching(join(where, "*/*.tar")) + _matching(join(where, "*/*.parquet"))
        hint = f"; there are some in folders below: '{where.rstrip('/')}/*/*{Path(deeper[0]).suffix}'" if deeper else ""
        raise InputError(f"{where}: no shards here; expected *.tar (webdataset) or *.parquet with images{hint}")
    shards = [Shard(path) for path in paths]
    for shard in shards:
        if shard.format not in ("tar", "parquet"):
            raise InputError(f"{shard.path}: not a shard; expected .tar, .tar.gz or .parquet")
    there = existing(paths)
    if missing := next((path for path in paths if path not in there), None):
        raise InputError(f"{missing}: no such file (named by {where})")
    by_name: dict[str, str] = {}
    for shard in shards:
        if shard.name in by_name:
            other = by_name[shard.name]
            raise InputError(f"{other} and {shard.path} share the name {shard.name}: their outputs would collide")
        by_name[shard.name] = shard.path
    return shards


def _paths(where: str) -> list[str]:
    if where.endswith(".txt"):
        if not exists(where):
            raise InputError(f"{where}: no such list file")
        lines = bytes(view(where)).decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if match := _RANGE.search(where):
        low, high = match.groups()
        if int(high) - int(low) > MAX_SHARDS:
            raise InputError(f"{where}: more than {MAX_SHARDS:,} shards")
        numbers = range(int(low), int(high) + 1)
        return [f"{where[: match.start()]}{n:0{len(low)}d}{where[match.end() :]}" for n in numbers]
    if any(c in where for c in "*?["):
        return _matching(where)
    if where.endswith((".tar", ".tar.gz", ".parquet")) and exists(where):
        return [where]
    if not is_folder(where):
        what = "not a shard; expected .tar, .tar.gz or .parquet" if exists(where) else "no such file or folder"
        raise InputError(f"{where}: {what}")
    paths = [path for path in _matching(join(where, "*.tar*")) if path.endswith((".tar", ".tar.gz"))]
    return paths or [p for p in _matching(join(where, "*.parquet")) if not is_sidecar(p)]


def _matching(pattern: str) -> list[str]:
    if not is_url(pattern):
        return glob(pattern)
    found = remote.glob(pattern)
    _listed.update(found)
    return list(found)


def absolute(path: str) -> str:
    """The path as workers must see it: their working directory is another one."""
    if not path:
        raise InputError("an empty path; name a folder")
    return path.rstrip("/") if is_url(path) else str(Path(path).absolute())


def refuse_folder_of(shards: Sequence[Shard], out: str) -> None:
    """Raises InputError where the output would lie among the input, by whatever name."""
    folders = {shard.path.rpartition("/")[0] for shard in shards}
    files = (Path(shard.path) for shard in shards if not is_url(shard.path))
    folders |= {str(file.resolve().parent) for file in files if file.is_symlink()}
    if _true(out) in map(_true, folders):
        raise InputError(f"{out} is the folder of the input; choose another OUT")


def _true(folder: str) -> str:
    """Its name without links and dots, by which two names of one folder are seen to be that."""
    return folder if is_url(folder) else str(Path(folder).resolve())


def is_url(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def exists(path: str) -> bool:
    return remote.info(path) is not None if is_url(path) else Path(path).exists()


def is_sidecar(path: str) -> bool:
    """Whether a parquet file is one of ours beside shards, by its name."""
    return bool(_SIDECARS.search(path.rsplit("/", 1)[-1]))


def existing(paths: Sequence[str]) -> set[str]:
    """Those that are there; remote ones by a listing of their folders, not one by one."""
    found = remote.existing([path for path in paths if is_url(path) and path not in _listed])
    return {path for path in paths if path in found or path in _listed or (not is_url(path) and Path(path).exists())}


def is_folder(path: str) -> bool:
    if is_url(path):
        found = remote.info(path)
        return found is not None and found["type"] == "directory"
    return Path(path).is_dir()


def glob(pattern: str) -> list[str]:
    if is_url(pattern):
        return list(remote.glob(pattern))
    # Path.glob takes no wildcard in the folders of an absolute pattern
    return sorted(p for p in globbing.glob(pattern, recursive=True) if not os.path.split(p)[1].startswith("."))  # noqa: PTH207


def make_folder(path: str) -> None:
    if not is_url(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot make this folder ({error.strerror})") from error


def stamp(path: str) -> dict[str, Any]:
    """What changes when a file is replaced, without reading it: size, and time or the store's own tag.

    Of a remote shard, what it was when it was listed.
    """
    if is_url(path):
        if (info := _listed.get(path) or remote.info(path)) is None:
            raise InputError(f"{path}: no such object")
        return {"bytes": info["size"], "tag": remote.tag(info)}
    found = Path(path).stat()
    return {"bytes": found.st_size, "tag": str(found.st_mtime_ns)}


def view(path: str) -> memoryview:
    """The bytes of a file, mapped: a remote one from a local disk, where it takes its size until it is let go."""
    if is_url(path):
        return remote.view(path)
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe that nobody writes to would block
            raise InputError(f"{path}: not a file")
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
        with remote.spool(path) as file:  # sent only when it is complete
            yield file
            remote.send(path, file)
        _listed.pop(path, None)
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
        if error.errno in FULL:
            why = "disk full" if error.errno == errno.ENOSPC else error.strerror
            raise InputError(f"{path}: {why}; free some space and run the same command again") from error
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
    else:
        remote.remove(path)


def clear_temporaries(folder: str) -> None:
    """Remove what killed writers left. Call it only while holding the folder's lock, where there is one."""
    if is_url(folder):
        remote.abort_stale(folder)
    else:
        for pattern in (".*.tmp", "*/.*.tmp"):
            for leftover in Path(folder).glob(pattern):
                leftover.unlink(missing_ok=True)

"""Objects of a store: listed by the page, read by the range, visible only when complete, retried by one rule.

Any fsspec filesystem works; S3 has calls of its own here, because fsspec's can neither say which version of an object a
range must be of, nor retry one page or one part. Its own retries are switched off: nested, they multiply. The price of
a bounded memory is local disk: an object is spooled to an unlinked file before it is used, and before it is sent.
"""

import fnmatch
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import IO, Any, TypeVar

from pipeline.errors import InputError
from pipeline.shards.retry import FULL, UploadLost, code, full, retried

RANGE = 32 * 1024**2  # of a read: streamed to disk, so it costs no memory
PART = 8 * 1024**2  # of an upload: held in memory, IN_FLIGHT of them
MAX_PARTS = 10_000  # S3's limit
IN_FLIGHT = 4  # ranges or parts of one object
CHUNK = 1024**2
STALE = timedelta(days=1)  # an upload that began earlier is no one's any more; a younger one may be another run's
FEW = 10  # names that are asked for one by one; more are looked up in a listing
_S3 = ("s3", "s3a")
_T = TypeVar("_T")
Info = dict[str, Any]  # fsspec's: name, size in bytes, type; ETag or a time, by the store
_last: tuple[str, str, memoryview] | None = None  # path, tag and bytes of the last large object


class _Replaced(InputError):
    """An object that is not the one that was asked for."""


class _Torn(OSError):
    """A body of another length than was asked for."""


def info(path: str) -> Info | None:
    """Size and tag of an object, or that it is a folder; None where there is neither. Never from a cache."""

    def ask() -> Info | None:
        try:
            return dict(_filesystem(path).info(path.rstrip("/")))
        except FileNotFoundError as error:
            if code(error) == "NoSuchBucket":
                raise
            return None

    return retried(path, ask)


def tag(found: Info) -> str:
    """What changes when an object is replaced: the store's own tag, or else a time."""
    names = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    return next((str(found[name]) for name in names if name in found), "")


def existing(paths: list[str]) -> dict[str, Info]:
    """Those that are there: a listing of each folder, not a request for each object."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    found: dict[str, Info] = {}
    for folder, named in folders.items():
        if len(named) <= FEW:
            found |= {path: it for path in named if (it := info(path))}
        else:
            names = [path.rpartition("/")[2] for path in named]
            there = dict(_listing(folder, os.path.commonprefix(names)))  # noqa: RUF071
            found |= {path: there[path] for path in named if path in there}
    return found


def glob(pattern: str) -> dict[str, Info]:
    """The objects that match, sorted by path. Names that begin with a dot match nothing, as on a disk."""
    folder, _, name = pattern.rpartition("/")
    if "**" in name or any(c in folder for c in "*?["):
        filesystem = _filesystem(pattern)
        there = retried(pattern, lambda: filesystem.glob(pattern, detail=True))
        found = {filesystem.unstrip_protocol(path): dict(it) for path, it in there.items()}
    else:
        listed = _listing(folder, re.split(r"[*?\[]", name)[0])
        found = {path: it for path, it in listed if fnmatch.fnmatchcase(path.rpartition("/")[2], name)}
    return {path: it for path, it in sorted(found.items()) if not path.rpartition("/")[2].startswith(".")}


def view(path: str) -> memoryview:
    """The bytes of an object, mapped from an unlinked file in TMPDIR.

    All ranges are of one version: an object that is replaced between them is an InputError, as are a missing object,
    a store that keeps failing, and a full disk.
    """
    global _last
    found = info(path)
    if found is None or found["type"] == "directory":
        raise InputError(f"{path}: no such object")
    size, version = int(found["size"]), tag(found)
    # Parquet is viewed twice in a row, and so is a shard that is filtered: the last one stays on disk.
    if _last and _last[:2] == (path, version):
        return _last[2]
    if size == 0:
        return memoryview(b"")
    try:
        data = _spooled(path, found)
    except _Replaced:
        if size > RANGE:
            raise
        return view(path)  # nothing is mixed yet: a marker, say, that another run has just written anew
    if size > PART:
        _last = (path, version, data)
    return data


def _spooled(path: str, found: Info) -> memoryview:
    size = int(found["size"])
    with spool(path) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so before anything is fetched
        _each(lambda start: _read(path, file.fileno(), start, min(start + RANGE, size), found), range(0, size, RANGE))
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


@contextmanager
def spool(path: str) -> Iterator[IO[bytes]]:
    """A local file without a name, for what comes from `path` or goes there."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        if error.errno in FULL:
            raise full(path) from error
        raise


def send(path: str, file: IO[bytes]) -> None:
    """Make `file` the object at `path`. It appears when all of it is there; a failure leaves nothing."""
    file.flush()
    size = os.fstat(file.fileno()).st_size
    if not _is_s3(path):
        retried(path, lambda: _copy(path, file))
    elif size <= PART:
        body = os.pread(file.fileno(), size, 0)
        retried(path, lambda: _s3(path, "put_object", Body=body))
    else:
        _send_parts(path, file.fileno(), size)


def remove(path: str) -> None:
    """Remove an object if it is there."""
    if info(path):
        retried(path, lambda: _filesystem(path).rm_file(path))


def abort_stale(folder: str) -> None:
    """Drop what killed writers have uploaded below `folder` (at most 1,000 uploads a call, which is a page).

    Such parts are never visible, but they are paid for. Those who may not list uploads leave it to the bucket's rules.
    """
    if not _is_s3(folder):
        return
    with suppress(InputError):
        ask = {"Key": None, "Prefix": _prefix(folder)}
        answer = retried(folder, lambda: _s3(folder, "list_multipart_uploads", **ask))
        for upload in answer.get("Uploads", ()):
            if upload["Initiated"] < datetime.now(UTC) - STALE:
                _abort(folder, upload["Key"], upload["UploadId"])


def _listing(folder: str, prefix: str = "") -> Iterator[tuple[str, Info]]:
    """`(path, info)` of the files of a folder whose names begin with `prefix`."""
    if _is_s3(folder):
        yield from _pages(folder, prefix)
        return
    if info(folder) is None:
        return
    for found in retried(folder, lambda: _filesystem(folder).ls(folder, detail=True)):
        name = found["name"].rpartition("/")[2]
        if found["type"] == "file" and name.startswith(prefix):
            yield f"{folder.rstrip('/')}/{name}", dict(found)


def _pages(folder: str, prefix: str) -> Iterator[tuple[str, Info]]:
    begin = _prefix(folder)
    more: dict[str, str] = {}
    while True:
        ask = {"Key": None, "Prefix": begin + prefix, "Delimiter": "/", **more}
        page = retried(folder, partial(_s3, folder, "list_objects_v2", **ask))
        for found in page.get("Contents", ()):
            if found["Key"] == begin:  # what consoles put there to show a folder
                continue
            path = f"{folder.rstrip('/')}/{found['Key'][len(begin) :]}"
            yield path, {"name": path, "size": found["Size"], "type": "file", "ETag": found["ETag"]}
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _read(path: str, handle: int, start: int, stop: int, found: Info) -> None:
    """Bytes [start, stop) of the object that `found` describes, to the same place of the local file."""

    def fetch() -> None:
        if _is_s3(path):
            _s3_range(path, handle, start, stop, found)
            return
        data = _filesystem(path).cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise _Torn(f"{len(data)} of {stop - start} bytes")
        os.pwrite(handle, data, start)

    try:
        retried(path, fetch)
    except InputError as error:
        if _replaced(path, found):
            raise _Replaced(f"{path}: replaced while it was read; run the same command again") from error
        raise
    if not _is_s3(path) and _replaced(path, found):  # S3 compares for us, range by range
        raise _Replaced(f"{path}: replaced while it was read; run the same command again")


def _replaced(path: str, found: Info) -> bool:
    with suppress(InputError):
        now = info(path)
        return now is None or (now["size"], tag(now)) != (found["size"], tag(found))
    return False


def _s3_range(path: str, handle: int, start: int, stop: int, found: Info) -> None:
    from fsspec.asyn import sync

    answer = _s3(path, "get_object", Range=f"bytes={start}-{stop - 1}", IfMatch=found["ETag"] or None)

    async def stream() -> None:
        position = start
        try:
            if answer.get("ContentRange") != f"bytes {start}-{stop - 1}/{found['size']}":
                raise _Torn(f"bytes {start}-{stop - 1} were asked for, {answer.get('ContentRange')} came")
            while chunk := await answer["Body"].read(min(CHUNK, stop - position) or 1):
                if position + len(chunk) > stop:
                    raise _Torn(f"more than the {stop - start} bytes asked for")
                os.pwrite(handle, chunk, position)
                position += len(chunk)
        finally:
            answer["Body"].close()
        if position < stop:
            raise _Torn(f"{position - start} of {stop - start} bytes")

    sync(_filesystem(path).loop, stream)


def _copy(path: str, file: IO[bytes]) -> None:
    """Any filesystem's own way to make a file appear at once."""
    filesystem = _filesystem(path)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    file.seek(0)
    remote = filesystem.open(path, "wb", autocommit=False)
    try:
        while chunk := file.read(CHUNK):
            remote.write(chunk)
        remote.close()
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            remote.discard()
        raise
    remote.commit()


def _send_parts(path: str, handle: int, size: int) -> None:
    """A multipart upload; begun again, once, where the store does not know it any more.

    That happens after a completion whose answer was lost, too: sending the same bytes again is right in both cases.
    """
    try:
        _upload(path, handle, size)
    except UploadLost:
        _upload(path, handle, size)


def _upload(path: str, handle: int, size: int) -> None:
    part = max(PART, -(-size // MAX_PARTS))
    upload = retried(path, lambda: _s3(path, "create_multipart_upload"))["UploadId"]

    def send_part(start: int) -> dict[str, Any]:
        number = 1 + start // part
        body = os.pread(handle, part, start)
        answer = retried(path, lambda: _s3(path, "upload_part", UploadId=upload, PartNumber=number, Body=body))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        parts = {"Parts": _each(send_part, range(0, size, part))}
        retried(path, lambda: _s3(path, "complete_multipart_upload", UploadId=upload, MultipartUpload=parts))
    except BaseException:
        _abort(path, _bucket_and_key(path)[1], upload)
        raise


def _abort(path: str, key: str, upload: str) -> None:
    with suppress(InputError):  # gone already, or the store is; what is left is stale in a day
        retried(path, lambda: _s3(path, "abort_multipart_upload", Key=key, UploadId=upload))


def _each(function: Callable[[int], _T], starts: range) -> list[_T]:
    """The results in order, IN_FLIGHT calls at a time; at the first error the others are not begun."""
    with ThreadPoolExecutor(min(IN_FLIGHT, len(starts))) as pool:
        return list(pool.map(function, starts))


def _is_s3(path: str) -> bool:
    return path.split("://", 1)[0] in _S3


def _bucket_and_key(path: str) -> tuple[str, str]:
    bucket, key, _ = _filesystem(path).split_path(path)
    return bucket, key


def _prefix(folder: str) -> str:
    key = _bucket_and_key(folder)[1].rstrip("/")
    return f"{key}/" if key else ""


def _s3(path: str, call: str, **arguments: Any) -> Any:
    """One request for the object at `path`, or with Key=None for its bucket."""
    bucket, key = _bucket_and_key(path)
    given = {"Bucket": bucket, "Key": key, **arguments}
    return _filesystem(path).call_s3(call, **{name: value for name, value in given.items() if value is not None})


def _filesystem(path: str) -> Any:
    protocol = path.split("://", 1)[0]
    try:
        return _opened(protocol, os.getpid())
    except (ValueError, ImportError) as error:
        raise InputError(f"{path}: {error}") from error


@cache
def _opened(protocol: str, process: int) -> Any:
    """One a process: connections do not survive a fork. Credentials and endpoint are what fsspec and s3fs find."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # a listing from before a write is a lie
    if protocol in _S3:
        theirs = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {**theirs, "retries": {"total_max_attempts": 1}}
    filesystem = fsspec.filesystem(protocol, **options)
    if protocol in _S3:
        filesystem.retries = 1
    return filesystem

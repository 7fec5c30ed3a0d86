"""A local file as memory that a read error cannot kill, and whose pages do not pile up.

A mapping reads at the speed of the page cache without a copy (4% over hashing alone, where `read` costs 9%), but a
broken disk shows itself as SIGBUS, and every page touched counts as the process's own. So each window is populated
before it is touched (an error then is an OSError), and what lies far behind is given back.
"""

import errno
import mmap
import os
import queue
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.store import is_url, view

WINDOW = 1024**2  # larger ones fall out of the second-level cache between hashing and writing
BEHIND = 16 * WINDOW  # pages kept behind the reader
TOUCHED_LATE = 256 * WINDOW  # a sample, of which one may be half as large, is hashed when the next was populated
MAX_RATIO = 100  # of a compressed tar: captions and json shrink to a fifth, images not at all
PACKED = 16 * 1024  # read at a time: zlib copies the rest of a piece at the end of every stream, and 20 bytes make one
_POPULATE_READ = 22  # Linux 5.14; Python has no name for it


class Mapping:
    """`view[start:end]` are bytes of the file; call `reach(end)` before touching them, with rising ends.

    A `content` that is given goes by the name of `path` in errors.
    """

    def __init__(self, path: str, content: memoryview | None = None):
        packed = path.endswith(".gz")
        self.path = path
        self.on_disk = content is None and not (packed or is_url(path))  # at its own path, that is
        if content is None:
            content = _unpacked(path, view(path)) if packed else view(path)
        self.view = content
        self.size = len(self.view)
        self._file = self.view.obj if isinstance(self.view.obj, mmap.mmap) else None
        self._given_back = 0

    def reach(self, end: int, reached: int) -> int:
        """Make the bytes up to `end` safe to touch, of which `reached` are already; returns how far it went."""
        goal = min(max(end, reached + WINDOW), self.size)
        if self._file is not None and goal > reached:
            first = reached // mmap.PAGESIZE * mmap.PAGESIZE
            try:
                self._file.madvise(_POPULATE_READ, first, goal - first)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel without it: the page fault does the same work
                    raise InputError(f"{self.path}: cannot be read around byte {first} ({error.strerror})") from error
            if first - self._given_back > 2 * BEHIND:
                again = max(0, self._given_back - TOUCHED_LATE)
                self._given_back = first - BEHIND
                self._file.madvise(mmap.MADV_DONTNEED, again, self._given_back - again)
        return goal


def read_ahead(file: Mapping, starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, memoryview, int, int]]:
    """`(base, bytes from base on, first, last)`: the ranges first..last of the file, read while the last are in use.

    The ranges ascend. Reading in a thread hides the disk, and of the page cache even the copy (5% of the hash); the
    bytes are overwritten when the next but one are asked for.
    """
    if not file.on_disk:
        yield 0, file.view, 0, len(starts)
        return
    plan, first = [], 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + WINDOW, "right")))
        plan.append((int(starts[first]), int(ends[last - 1] - starts[first]), first, last))
        first = last
    free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    full: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(3):
        free.put(bytearray(WINDOW))

    def read() -> None:
        try:
            with Path(file.path).open("rb", buffering=0) as source:
                for base, size, *_ in plan:
                    buffer = free.get()
                    if size > len(buffer):
                        buffer = bytearray(size)
                    if os.preadv(source.fileno(), [memoryview(buffer)[:size]], base) != size:
                        raise OSError(errno.EIO, f"file ends before byte {base + size}")
                    full.put(buffer)
        except Exception as error:  # whatever it is, the reader must not wait for ever
            full.put(error)

    threading.Thread(target=read, daemon=True).start()
    for base, size, first, last in plan:
        buffer = full.get()
        if isinstance(buffer, Exception):
            raise InputError(f"{file.path}: cannot be read around byte {base} ({buffer})") from buffer
        yield base, memoryview(buffer)[:size], first, last
        free.put(buffer)


def _unpacked(path: str, packed: memoryview) -> memoryview:
    """The content of a gzip file, in an unnamed file of the temporary folder."""
    inflate, size, begun = zlib.decompressobj(wbits=31), 0, False
    with tempfile.TemporaryFile() as file:
        try:
            for at in range(0, len(packed), PACKED):
                piece = bytes(packed[at : at + PACKED])
                while piece:
                    begun = True
                    size += file.write(inflate.decompress(piece, 16 * WINDOW))
                    if size > MAX_RATIO * (at + WINDOW):
                        raise InputError(f"{path}: unpacks to more than {MAX_RATIO} times its size; refused")
                    piece = inflate.unconsumed_tail
                    if inflate.eof:  # a file may be several streams, one behind the other
                        piece, inflate, begun = inflate.unused_data, zlib.decompressobj(wbits=31), False
            if begun:  # without its last bytes nothing says that the content is what was packed
                raise InputError(f"{path}: truncated at byte {len(packed)} of the gzip file; fetch the shard again")
            file.flush()
        except zlib.error as error:
            raise InputError(f"{path}: not a readable gzip file ({error}); fetch the shard again") from error
        except OSError as error:
            where = f"in {tempfile.gettempdir()} ({error.strerror}); TMPDIR names another place"
            raise InputError(f"{path}: cannot be unpacked {where}") from error
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")

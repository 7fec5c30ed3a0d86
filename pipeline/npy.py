"""Matrices that others wrote with numpy, mapped and not loaded: an .npy file, or a member of an .npz.

Trade-off: np.load maps no .npz and takes a longer file for a whole one; here a header must account for every byte, and
a stored member (what np.savez writes) is mapped where it lies in the zip. Its checksum is not read, as that would read
all of it. Only a compressed member is held whole, within a bound.
"""

import io
import math
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.store import view

MAX_DIMENSION = 4096  # the widest CLIP that is published has 1,536
NORM_TOLERANCE = 0.01  # of a unit vector in half precision; its rounding is a tenth of that
MAX_INFLATED = 2**30  # bytes of a compressed array, which is held whole: 700,000 rows of 768 half floats
AGAIN = "fetch or make it again"
_HEADER, _CHUNK = 4096, 2**20


@dataclass(frozen=True)
class Array:
    """An .npy file, or a `member` of an .npz. Rows are `normalised` where their publisher says so."""

    path: str
    member: str = ""
    normalised: bool = False

    def open(self) -> "Matrix":
        """Map the array. Raises InputError on a torn file and on what is no float16 or float32 [n, d]."""
        data, where = view(self.path), f"{self.path} {self.member}".rstrip()
        found = read_npy(_member(self.path, self.member, data) if self.member else data, where)
        if found.ndim != 2 or found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4):
            raise InputError(f"{where}: {found.dtype} {list(found.shape)}, not float16 or float32 [n, d]")
        if not 0 < found.shape[1] <= MAX_DIMENSION:
            raise InputError(f"{where}: embeddings of width {found.shape[1]}; 1 to {MAX_DIMENSION} are read")
        return Matrix(found, where, self.normalised)


@dataclass(frozen=True)
class Matrix:
    """A mapped array [n, d] and how to call it in an error."""

    values: np.ndarray
    where: str
    normalised: bool

    def rows(self, which: np.ndarray) -> np.ndarray:
        """float16 [len(which), d], checked; only these rows are read, as checking all would read the dataset twice."""
        with np.errstate(over="ignore"):
            found = self.values[which].astype(np.float16)
        if len(bad := np.flatnonzero(~np.isfinite(found).all(1))):
            raise InputError(f"{self.where}: row {which[bad[0]]} is not finite in half precision; {AGAIN}")
        length = np.linalg.norm(found.astype(np.float32), axis=1)
        if self.normalised and len(bad := np.flatnonzero(np.abs(length - 1) > NORM_TOLERANCE)):
            raise InputError(f"{self.where}: row {which[bad[0]]} has length {length[bad[0]]:.3f}, not 1; {AGAIN}")
        return found


def read_npy(data: memoryview, where: str) -> np.ndarray:
    """The array of an .npy file without a copy; its header must account for every byte that is there."""
    header = io.BytesIO(data[: _HEADER + 16])
    try:
        version = np.lib.format.read_magic(header)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(header, max_header_size=_HEADER)
    except Exception as error:  # a parser meets hostile bytes here; whatever it raises, the file is bad
        raise InputError(f"{where}: not an .npy array ({type(error).__name__}); {AGAIN}") from error
    if dtype.hasobject or fortran:
        raise InputError(f"{where}: pickled objects and Fortran order are not read; save a plain C array with np.save")
    expected = header.tell() + dtype.itemsize * math.prod(shape)
    if len(data) != expected or min(shape, default=0) < 0:
        raise InputError(f"{where}: torn: {len(data)} bytes, but its header says {expected}; {AGAIN}")
    return np.ndarray(shape, dtype, data, header.tell())


class _Bounded(io.FileIO):
    """zipfile reads a zip's directory in one go, as long as the file says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _CHUNK:
            raise zipfile.BadZipFile("its directory is too large")
        return super().read(size)


def _member(path: str, name: str, data: memoryview) -> memoryview:
    """A member of a zip: a slice of the mapped file where it is stored, as np.savez does, else read whole."""
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            info = archive.getinfo(name)
            if info.compress_type == zipfile.ZIP_STORED:
                return _stored(info, data)
            if info.compress_type != zipfile.ZIP_DEFLATED:  # numpy writes no other; LZMA may ask for any memory
                raise zipfile.BadZipFile(f"{name} is compressed by method {info.compress_type}")
            if info.file_size > MAX_INFLATED:
                raise InputError(f"{path}: {name} inflates to {info.file_size} bytes; save it with np.savez instead")
            with archive.open(info) as member:
                return memoryview(b"".join(iter(lambda: member.read(_CHUNK), b"")))
    except KeyError as error:
        raise InputError(f"{path}: no array {name.removesuffix('.npy')}; {AGAIN}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise InputError(f"{path}: not a whole .npz ({error}); {AGAIN}") from error


def _stored(info: zipfile.ZipInfo, data: memoryview) -> memoryview:
    """The local header repeats the name and has fields of its own, so only it tells where the content starts."""
    local = bytes(data[info.header_offset : info.header_offset + 30])
    if local[:4] != b"PK\3\4" or info.flag_bits & 1:
        raise zipfile.BadZipFile(f"{info.filename} is not where the directory says")
    start = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return data[start : start + info.file_size]

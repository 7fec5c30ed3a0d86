"""Arrays of others, stored, compressed, torn and hostile."""

import io
import mmap
import struct
import zipfile

import numpy as np
import pytest

from pipeline import npy
from pipeline.errors import InputError
from pipeline.npy import Array


def test_stored_members_are_mapped_and_compressed_ones_are_read(tmp_path):
    path, want = tmp_path / "a.npz", np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(path, other=np.zeros((5, 5)), x=want)
    stored = Array(str(path), "x.npy").open().values
    np.testing.assert_array_equal(stored, want)
    assert isinstance(stored.base, mmap.mmap)
    np.savez_compressed(path, other=np.zeros((5, 5)), x=want)
    inflated = Array(str(path), "x.npy").open().values
    np.testing.assert_array_equal(inflated, want)
    assert isinstance(inflated.base, bytes)


def test_hostile_archives_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((64, 8), np.float16))
    monkeypatch.setattr(npy, "MAX_INFLATED", 1000)
    with pytest.raises(InputError, match="inflates to 1152 bytes"):
        Array(str(path), "x.npy").open()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", _saved(GOOD))
    with pytest.raises(InputError, match=r"not a whole \.npz \(x\.npy is compressed by method 14"):
        Array(str(path), "x.npy").open()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3000):
            archive.writestr(f"{i}{'-' * 400}", b"")
    with pytest.raises(InputError, match="directory is too large"):
        Array(str(path), "x.npy").open()
    np.savez(path, x=np.zeros((4, 8), np.float16))
    data = bytearray(path.read_bytes())
    data[:4] = b"none"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not where the directory says"):
        Array(str(path), "x.npy").open()


def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(tmp_path):
    path = tmp_path / "a.npy"
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({2**40}, 512), }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(1024))
    with pytest.raises(InputError, match="torn: "):
        Array(str(path)).open()


def _saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


GOOD = np.ones((25, 16), np.float16)
REFUSED = {
    "double": (_saved(GOOD.astype(np.float64)), r"float64 \[25, 16\], not float16 or float32"),
    "flat": (_saved(GOOD.ravel()), r"float16 \[400\], not float16 or float32 \[n, d\]"),
    "too wide": (_saved(np.tile(GOOD, 300)), "embeddings of width 4800"),
    "no width": (_saved(GOOD[:, :0]), "embeddings of width 0"),
    "pickled": (_saved(np.asarray([[{}]], object)), "pickled objects"),
    "Fortran order": (_saved(np.asfortranarray(GOOD)), "pickled objects and Fortran order"),
    "no array": (b"<html>", "not an .npy array"),
    "empty": (b"", "not an .npy array"),
    "cut": (_saved(GOOD)[:-2], "torn: 926 bytes, but its header says 928"),
    "longer": (_saved(GOOD) + bytes(32), "torn: 960 bytes, but its header says 928"),
    "nested header": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 4000) + b"(" * 3999 + b"\n", "not an .npy array"),
    "long header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(9000), "not an .npy array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_matrix_of_floats_is_refused(tmp_path, case):
    data, message = REFUSED[case]
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.npy: {message}"):
        Array(str(tmp_path / "a.npy")).open()


def test_bytes_in_the_other_order_are_the_same_numbers(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=">f4").reshape(2, 3))
    np.testing.assert_array_equal(Array(str(tmp_path / "a.npy")).open().rows(np.asarray([1])), [[3, 4, 5]])

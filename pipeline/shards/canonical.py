"""Rows as bytes that depend on their values alone, so that a digest tells whether two rows are equal.

Not on row groups, slices, encodings or dictionaries. A run of n values is written as

    n bytes, 1 where there is a value and 0 where there is null; then, by type,
    fixed width      n values, little-endian as Arrow has them, zeros for null (numbers, dates, times, decimals, …)
    booleans         n bytes
    strings, bytes   n lengths (uint64, little-endian), then the contents
    lists, maps      n lengths, then the run of all items (of a map: the run of structs of key and value)
    structs          the runs of the fields

and a row is the run of one struct of its columns. `schema` says how to read it, so that 1, "1" and 1.0 differ.

Trade-off: columns inside a row, not values one by one: a list of 768 floats is one slice of memory.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[int, int], bytes]


def schema(fields: Any) -> bytes:
    """Names and types, in order, as JSON: `[["uid","string"],["box",["list","float"]],["image",["struct",[…]]]]`."""
    return json.dumps([[field.name, _type(field.type)] for field in fields], separators=(",", ":")).encode()


def _type(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return ["struct", [[field.name, _type(field.type)] for field in kind]]
    if pa.types.is_map(kind):
        return ["map", _type(kind.key_type), _type(kind.item_type)]
    if pa.types.is_list(kind):
        return ["list", _type(kind.value_type)]
    return str(kind)


def runs(array: Any) -> Run:
    """`run(a, b)`: the values from row a up to row b of a pyarrow array."""
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    there, rest = valid.tobytes(), _payload(array, array.type, valid)
    return lambda a, b: there[a:b] + rest(a, b)


def _payload(array: Any, kind: Any, valid: np.ndarray) -> Run:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return _struct(array.flatten())
    if pa.types.is_map(kind):
        return _lengths(array, _struct([array.keys, array.items], len(array.keys)))
    if pa.types.is_list(kind):
        return _lengths(array, runs(array.values))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        data = memoryview(array.buffers()[2] or b"")
        return _lengths(array, lambda a, b: bytes(data[a:b]))
    if pa.types.is_null(kind):
        return lambda a, b: b""
    if pa.types.is_boolean(kind):
        flags = array.fill_null(False).to_numpy(zero_copy_only=False).tobytes()
        return lambda a, b: flags[a:b]
    width = kind.bit_width // 8  # raises ValueError where it has none
    buffer = array.buffers()[1]
    values = np.frombuffer(buffer or b"", np.uint8, len(array) * width, array.offset * width) if len(array) else valid
    fixed = (values.reshape(len(array), width) * valid[:, None]).tobytes()
    return lambda a, b: fixed[a * width : b * width]


def _struct(fields: list[Any], size: int | None = None) -> Run:
    inner = [runs(field) for field in fields]
    there = b"\1" * (size or 0)
    return lambda a, b: there[a:b] + b"".join([run(a, b) for run in inner])


def _lengths(array: Any, inner: Run) -> Run:
    """Lengths and what they enclose; parquet stores nothing for a null, so there is nothing to leave out."""
    offsets = np.frombuffer(array.buffers()[1] or bytes(8), np.int32)[array.offset : array.offset + len(array) + 1]
    at, lengths = offsets.tolist(), np.diff(offsets).astype("<u8").tobytes()
    return lambda a, b: lengths[8 * a : 8 * b] + inner(at[a], at[b])

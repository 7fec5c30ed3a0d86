"""Thrift's compact protocol, as far as parquet uses it: enough to move a row group without understanding all of it.

Trade-off: structs are dicts of field id to (kind, value), not generated classes. So a field of a newer parquet is
carried along instead of lost, and 100 lines do; it is slow (a million values a second), which a footer can afford.

What is read may be hostile: depth and number of values are bounded, and nothing is allocated for a stated length that
the bytes do not cover.
"""

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
MAX_DEPTH = 32
MAX_FIELDS = 100
MAX_VALUES = 4_000_000  # of one struct, whatever is nested in it: some 500 MB as Python objects

Struct = dict[int, tuple[int, Any]]  # field id -> (kind, value); of a list, the value is (kind of its items, items)
Buffer = bytes | memoryview


def read_struct(data: Buffer, start: int, end: int) -> tuple[Struct, int]:
    """The struct that begins at `start`, and where it ends. Raises ValueError on what is not whole or too large."""
    reader = _Reader(data, start, end)
    return reader.struct(0), reader.at


def written(struct: Struct) -> bytes:
    """The bytes of a struct."""
    out = bytearray()
    _write(out, STRUCT, struct)
    return bytes(out)


def get(struct: Struct, field: int, kind: int, default: Any = None) -> Any:
    """Raises ValueError where the field is of another kind, or missing and without a default."""
    found, value = struct.get(field, (kind, default))
    if found != kind or value is None:
        raise ValueError(f"field {field} is missing or of another kind")
    return value


def items(struct: Struct, field: int, kind: int) -> list[Any]:
    found, values = get(struct, field, LIST)
    if values and found != kind:
        raise ValueError(f"field {field} is a list of another kind")
    return list(values)


class _Reader:
    def __init__(self, data: Buffer, start: int, end: int):
        self.data, self.at, self.end, self.values = data, start, end, 0

    def byte(self) -> int:
        if self.at >= self.end:
            raise ValueError("ends within a value")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        value = (value >> 1) ^ -(value & 1)
        if not -(2**63) <= value < 2**63:
            raise ValueError("a number of more than 64 bits")
        return value

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise ValueError("ends within a value")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def struct(self, depth: int) -> Struct:
        found: Struct = {}
        field = 0
        while head := self.byte():
            kind = head & 15
            field = field + (head >> 4) if head >> 4 else self.integer()
            if field in found or len(found) > MAX_FIELDS:
                raise ValueError(f"field {field} occurs twice, or among more than {MAX_FIELDS}")
            found[field] = (kind, kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth + 1))
        return found

    def value(self, kind: int, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_VALUES} values or {MAX_DEPTH} levels")
        if kind in (I16, I32, I64):
            return self.integer()
        if kind == BINARY:
            return self.take(self.varint())
        if kind == STRUCT:
            return self.struct(depth)
        if kind in (LIST, SET):
            head = self.byte()
            size, items = head >> 4 if head < 0xF0 else self.varint(), head & 15
            if size > self.end - self.at:  # the smallest item is a byte
                raise ValueError("a list longer than the bytes there are")
            return items, [self.value(items, depth + 1) for _ in range(size)]
        if kind == DOUBLE:
            return self.take(8)
        if kind in (TRUE, FALSE, BYTE):  # a boolean in a list is a byte
            return self.byte()
        raise ValueError(f"a value of kind {kind}, which parquet has not")


def _write(out: bytearray, kind: int, value: Any) -> None:
    if kind in (I16, I32, I64):
        _write_varint(out, value * 2 if value >= 0 else -value * 2 - 1)
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        before = 0
        for field, (inner, content) in sorted(value.items()):
            head = (TRUE if content else FALSE) if inner in (TRUE, FALSE) else inner
            if 0 < field - before < 16:
                out.append((field - before) << 4 | head)
            else:
                out.append(head)
                _write(out, I16, field)
            before = field
            if inner not in (TRUE, FALSE):
                _write(out, inner, content)
        out.append(0)
    elif kind in (LIST, SET):
        inner, items = value
        out.append(min(len(items), 15) << 4 | inner)
        if len(items) > 14:
            _write_varint(out, len(items))
        for item in items:
            _write(out, inner, item)
    elif kind == DOUBLE:
        out += value
    else:
        out.append(value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)

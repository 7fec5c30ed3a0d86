"""The parquet files beside the shards: read with an error that says what is wrong, written absent or whole."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.store import exists, view, whole

MAX_BYTES = 2 * 1024**3  # that a file's headers may claim its values to take


def read(
    path: str, columns: Sequence[str], remedy: str, filters: Any = None, hostile: bool = False, only: bool = False
) -> Any:
    """A parquet file as a pyarrow table. An InputError that ends in `remedy` where it is missing or not that file.

    It must have the `columns`, and may have others, which are read too unless `only`.
    pyarrow allocates what the headers ask for, a terabyte from 5 KB. With `hostile` they are checked as a shard's are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not exists(path):
        raise InputError(f"{path}: no such file; {remedy}")
    data = view(path)
    if hostile:
        _check_sizes(path, data, remedy)
    try:
        names = list(columns) if only else None
        table = pq.read_table(pa.BufferReader(pa.py_buffer(data)), columns=names, filters=filters)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise broken(path, remedy) from error
    if missing := [name for name in columns if name not in names]:
        raise InputError(f"{path}: no column {', '.join(missing)}; {remedy}")
    return table


def _check_sizes(path: str, data: memoryview, remedy: str) -> None:
    from pipeline.shards.footer import Footer
    from pipeline.shards.pages import VALUES
    from pipeline.shards.thrift import I64, get

    try:
        footer = Footer(path, data)
        claimed = 0
        for number, group in enumerate(footer.groups):
            footer.slicing(number)
            claimed += sum(
                get(chunk.meta, VALUES, I64) * max(8, page.longest)
                for chunk, page in zip(group.chunks, footer.pages(number), strict=True)
            )
        if claimed > MAX_BYTES:
            raise broken(path, remedy)
    except InputError as error:
        raise broken(path, remedy) from error


def broken(path: str, remedy: str) -> InputError:
    return InputError(f"{path}: not a readable parquet file of its kind; {remedy}")


def save(path: str, table: Any, **options: Any) -> None:
    """Write a pyarrow table, absent or whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(path) as file:
        pq.write_table(table, pa.PythonFile(file, "w"), **options)


def fixed(rows: np.ndarray) -> Any:
    """[n, d] as an array of fixed-size lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def matrix(column: Any) -> np.ndarray:
    """[n, d] of a column of fixed-size lists; what a null row has is undefined."""
    width = column.type.list_size
    rows = column.combine_chunks()
    flat = rows.values.slice(rows.offset * width, len(rows) * width).to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, width)


def rows_of(wanted: Sequence[str] | np.ndarray, have: np.ndarray) -> np.ndarray:
    """int64[n]: the row of each wanted uid, -1 where there is none; nothing is joined by position."""
    if len(wanted) == len(have) and all(map(operator.eq, wanted, have)):  # as a rule, and then half of the time
        return np.arange(len(have))
    at = {uid: row for row, uid in enumerate(have)}
    return np.asarray([at.get(uid, -1) for uid in wanted], np.int64)

"""The parquet files beside the shards: read with an error that says what is wrong, written absent or whole."""

from typing import Any

from pipeline.errors import InputError
from pipeline.shards.store import exists, view, whole


def read(path: str, columns: tuple[str, ...], remedy: str, filters: Any = None) -> Any:
    """A parquet file as a pyarrow table. An InputError that ends in `remedy` where it is missing or not that file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not exists(path):
        raise InputError(f"{path}: no such file; {remedy}")
    try:
        table = pq.read_table(pa.BufferReader(pa.py_buffer(view(path))), filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise broken(path, remedy) from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise InputError(f"{path}: no column {', '.join(missing)}; {remedy}")
    return table


def broken(path: str, remedy: str) -> InputError:
    return InputError(f"{path}: not a readable parquet file of its kind; {remedy}")


def save(path: str, table: Any, **options: Any) -> None:
    """Write a pyarrow table, absent or whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(path) as file:
        pq.write_table(table, pa.PythonFile(file, "w"), **options)

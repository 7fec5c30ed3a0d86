"""`results.parquet` of a loop, read as hostile input.

Trade-off: rows are read whole, since a table of runs is small; what is in none of the columns that a verb needs is not
looked at.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arms import ArmKey
from pipeline.errors import InputError
from pipeline.report.text import named
from pipeline.shards.store import whole
from train.results import SUCCESS

if TYPE_CHECKING:
    import polars as pl

FILE, REPORT = "results.parquet", "report.html"  # of a loop; the second only when it has ended
NEEDED = ("attack", "dose", "dose_ppm", "seed", "arm", "zeroshot_top1", "zeroshot_top1_n")
DATA = {"recipe_digest": "recipes", "dataset_digest": "datasets", "evaluation_digest": "evaluations"}
MEASURED = (*SUCCESS, "zeroshot_top1", "knn_top1")  # rates that verbs look at, each with its n
TEXTS = ("attack", *ArmKey._fields, "recipe", "code", *DATA)
NUMBERS = ("dose_ppm", "samples", "train_cpu_seconds", "filter_cpu_seconds_per_million")
Row = dict[str, Any]


def read(where: str) -> list[Row]:
    """Rows of a loop's results.parquet, or of the folder that holds it. Raises InputError where they are not that."""
    import polars as pl

    path = Path(where, FILE) if Path(where).is_dir() else Path(where)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `mithridate loop` writes it")
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from error
    if missing := [name for name in NEEDED if name not in table.columns]:
        raise InputError(f"{path}: not the results of a loop; there is no column {', '.join(missing)}")
    if not any(f"{name}_n" in table.columns for name in SUCCESS):
        raise InputError(f"{path}: no measure of success with its n; there should be one of {', '.join(SUCCESS)}")
    if not len(table):
        raise InputError(f"{path}: no rows")
    if table.select(NEEDED[:5]).null_count().sum_horizontal().item():
        raise InputError(f"{path}: {', '.join(NEEDED[:5])} must be in every row")
    _check(path, table)
    return table.to_dicts()


def _check(path: Path, table: "pl.DataFrame") -> None:
    """Raises InputError where a column that some verb looks at is not of its type, or a number none that can be."""
    import polars as pl

    counts = ("dose", "seed", *(f"{name}_n" for name in MEASURED))
    for name, kind in table.schema.items():
        if name in TEXTS and kind not in (pl.String, pl.Null):
            raise InputError(f"{path}: {name} must be text")
        if kind == pl.Null or name not in (*counts, *NUMBERS, *MEASURED):
            continue
        if not (kind.is_integer() or (kind.is_float() and name not in counts)):
            raise InputError(f"{path}: {name} must be {'whole ' if name in counts else ''}numbers")
        column = table[name].drop_nulls()  # NaN is above all numbers
        if not ((column >= 0) & (column <= 1 if name in MEASURED else column < float("inf"))).all():
            raise InputError(f"{path}: {name} must be {'rates' if name in MEASURED else 'finite, and 0 or more'}")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """As parquet, absent or whole; a column is of all rows' type, null where a row lacks it."""
    import polars as pl

    with whole(str(path)) as file:
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(file)


def versions(rows: Sequence[Row]) -> list[str]:
    """Recipes, data and code digests of the rows, with how many there are of each."""
    found: dict[str, int] = {}
    for row in rows:
        recipe, data, evaluation = (named(row.get(name) or "?") for name in DATA)
        name = f"recipe {named(row.get('recipe') or '?')} ({recipe}), data {data}, evaluation {evaluation}"
        name += f", code {named(row.get('code') or '?')}"
        found[name] = found.get(name, 0) + 1
    return [f"{name}: {n} rows" for name, n in found.items()]


def several(rows: Iterable[Row]) -> list[str]:
    """What of DATA the rows have several of; what a row does not tell is taken to be the same."""
    there = list(rows)
    return [called for name, called in DATA.items() if len({row[name] for row in there if row.get(name)}) > 1]

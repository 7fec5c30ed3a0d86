"""The TOML file of a loop <-> frozen dataclasses; unknown keys are errors that list the valid ones."""

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.shards import UidRule
from pipeline.spec import fits, type_name
from train.readouts import ReadoutName

POOL = 16384  # as `score` has it


@dataclass(frozen=True)
class Scores:
    """Detectors over the embeddings of one epoch's checkpoint (and the traces up to the end).

    `pool`: reference rows, as of `score`. Another number than the default is for tables of detectors alone: filters
    read the scores of the default pool.
    """

    epoch: int
    detectors: tuple[str, ...]
    pool: int = POOL

    @property
    def when(self) -> str:
        """In words."""
        return f"epoch {self.epoch}" + ("" if self.pool == POOL else f", pool of {self.pool:,}")


@dataclass(frozen=True)
class Filter:
    """A policy over the scores of one epoch, or several: an arm that is trained again on what it keeps.

    With several, detectors are told apart as in `filter`: 'scores-004:slof' is that of epoch 4.
    """

    epoch: int | tuple[int, ...]
    policy: str

    @property
    def epochs(self) -> tuple[int, ...]:
        return self.epoch if isinstance(self.epoch, tuple) else (self.epoch,)

    @property
    def when(self) -> str:
        """In words."""
        return f"epoch {self.epoch}" if isinstance(self.epoch, int) else "epochs " + ", ".join(map(str, self.epoch))


@dataclass(frozen=True)
class Config:
    """The TOML file. `reference`: labelled clean shards for the image-kNN readout (default: `shards`).

    A dose is one of `poison`, or `adaptive(low='0.3%', high='10%', factor=1.5)`: a bisection for each attack, arm and
    seed.
    `defenses` are specs, an arm each; those that repair a model are given the undefended one.
    `readouts` are those of `evaluate`; the linear probe takes longer than a small training.
    """

    shards: str
    evaluation: str
    classes: str
    attacks: tuple[str, ...]
    doses: tuple[str, ...]
    scores: tuple[Scores, ...] = ()
    filters: tuple[Filter, ...] = ()
    defenses: tuple[str, ...] = ()
    recipe: str = "demo"
    seeds: tuple[int, ...] = (0,)
    reference: str = ""
    readouts: tuple[ReadoutName, ...] = ("knn", "prototypes")
    uid: UidRule = "key"
    title: str = "Poison, filter, train again"

    @classmethod
    def read(cls, path: str) -> "Config":
        """Raises InputError on unknown or missing keys, naming the valid ones."""
        return _read(path, cls, scores=Scores, filters=Filter)

    def earlier(self, epoch: int) -> int | None:
        """The last epoch before it at which something is scored, which a detector of two epochs compares with."""
        return max((scores.epoch for scores in self.scores if scores.epoch < epoch), default=None)


@dataclass(frozen=True)
class Trials:
    """Attacks that are tried at the same doses with the same seeds."""

    attacks: tuple[str, ...]
    doses: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Validation:
    """The TOML file of `validate-attack`. Without `shards` the embedded data; `floor`: success that counts as valid."""

    trials: tuple[Trials, ...]
    recipe: str = "fast"
    floor: float = 0.5
    shards: str = ""
    evaluation: str = ""
    classes: str = ""
    reference: str = ""
    uid: UidRule = "key"

    @classmethod
    def read(cls, path: str) -> "Validation":
        """Raises InputError on unknown or missing keys, naming the valid ones."""
        found: Validation = _read(path, cls, trials=Trials)
        if bool(found.shards) != bool(found.evaluation and found.classes):
            raise InputError(f"{path}: shards, evaluation and classes go together")
        return found


def _read(path: str, whole: type, **tables: type) -> Any:
    try:
        values = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})") from error
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for key, kind in tables.items():
        rows = values.get(key, ())
        if not isinstance(rows, tuple) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: write [[{key}]] tables")
        values[key] = tuple(_strict(path, kind, row) for row in rows)
    return _strict(path, whole, values)


def _strict(path: str, kind: type, values: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := values.keys() - fields.keys():
        raise InputError(f"{path}: unknown keys {', '.join(sorted(unknown))}; there are: {', '.join(fields)}")
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise InputError(f"{path}: missing keys {', '.join(missing)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if not fits(value, hints[key]):
            raise InputError(f"{path}: {key} = {value!r} is not {type_name(hints[key])}")
    return kind(**values)

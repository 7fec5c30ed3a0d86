"""How the arguments that many verbs share look on the command line."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from pipeline.errors import InputError

Shards = Annotated[str, tyro.conf.arg(metavar="SHARDS")]
Out = Annotated[str, tyro.conf.arg(metavar="OUT")]
Checkpoint = Annotated[str, tyro.conf.arg(metavar="CKPT")]


def at_least_one(option: str, values: Sequence[str]) -> None:
    """An option without a value takes none, and one before OUT takes all but that word."""
    if not values:
        raise InputError(f"{option}: name one at least (is OUT there, after SHARDS?)")

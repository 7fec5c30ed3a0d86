"""What detectors ask of a run. A detector is a frozen dataclass, and this is the one place that looks at its parts.

It must have `needs`, the columns (`filters/_batch.py`) that it looks at, and `score(batch, pool)`. It may have `pools`,
the columns of the reference rows that it compares with (none: its pool is None), and `k`, of how many nearest rows; and
where it asks for the neighbours that pool rows have among themselves, `within`, of which columns and how many: they are
found once for all shards. For what only the whole dataset can tell it has `summarize(batch) -> S` and
`merge(S, S) -> S`, and its `score(batch, pool, summary)` gets the whole. One with a model says so: `files`, what it
reads besides (scores are made anew when they change), and `gpu`, whether it is worth one. One that is made of others
says all that itself, in `wants`.

Trade-off: an attribute that is misspelt in a detector is one that it does not have. In exchange a detector writes down
what it has, derives from nothing, and twenty lines make one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Wants:
    """What one detector, or all of a run, ask for.

    needs, pools: names of columns. k: of how many nearest rows of the pool, a number a detector; in_batch: the same of
    those that compare the pairs of one batch with each other. within: by columns the greatest k. files: paths. whole:
    whether it learns from the whole dataset first.
    """

    needs: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    k: tuple[int, ...] = ()
    in_batch: tuple[int, ...] = ()
    within: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    gpu: bool = False
    whole: bool = False

    @classmethod
    def of(cls, *detectors: Any) -> "Wants":
        """Of all together."""
        wants = [_of(detector) for detector in detectors]
        within: dict[tuple[str, ...], int] = {}
        for one in wants:
            within |= {columns: max(k, within.get(columns, 0)) for columns, k in one.within.items()}
        return cls(
            _union(one.needs for one in wants),
            _union(one.pools for one in wants),
            _union(one.k for one in wants),
            _union(one.in_batch for one in wants),
            within,
            _union(one.files for one in wants),
            any(one.gpu for one in wants),
            any(one.whole for one in wants),
        )


def _of(detector: Any) -> Wants:
    if isinstance(wants := getattr(detector, "wants", None), Wants):
        return wants
    k = (detector.k,) if hasattr(detector, "k") else ()
    alone = getattr(detector, "reference", "pool") == "batch"
    return Wants(
        needs=tuple(detector.needs),
        pools=tuple(getattr(detector, "pools", ())),
        k=() if alone else k,
        in_batch=k if alone else (),
        within=getattr(detector, "within", {}),
        files=tuple(getattr(detector, "files", ())),
        gpu=getattr(detector, "gpu", False),
        whole=hasattr(detector, "summarize"),
    )


def _union(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(one for part in parts for one in part))

"""Which arm a row of results is of: what tells it from the others, its short name, and what kind of arm it is.

Trade-off: an arm is known by what its row says, so results of other code and other machines have arms too; what a row
does not say tells nothing apart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from pipeline import spec
from pipeline.errors import InputError

UNDEFENDED: Final = "undefended"
CONTROLS = ("random", "oracle")  # detectors: what removal alone does, and what the truth would


class ArmKey(NamedTuple):
    """The columns of a row that tell its arm from others."""

    arm: str
    when: str | None = None
    policy: str | None = None
    defense: str | None = None
    detectors: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "ArmKey":
        return cls(row["arm"], *(row.get(name) for name in cls._fields[1:]))

    @property
    def kind(self) -> Literal["undefended", "control", "filter", "defense"]:
        if self.arm == UNDEFENDED:
            return UNDEFENDED
        if is_control(self.arm):
            return "control"
        return "defense" if self.defense else "filter"


def is_control(detector: str) -> bool:
    return detector.partition("(")[0] in CONTROLS


def labels(rows: Iterable[Mapping[str, Any]]) -> dict[ArmKey, str]:
    """A short name for each arm: what it needs to be told from the others, and no more."""
    keys = list(dict.fromkeys(map(ArmKey.of, rows)))
    short = {key: _short(key) for key in keys}
    told: Sequence[Callable[[ArmKey], str]] = (
        _removed,
        lambda key: key.when or "",
        lambda key: key.policy or key.defense or "",
        lambda key: key.detectors or "",
    )
    for add in told:
        differ: dict[str, set[str]] = {}
        for key, name in short.items():
            differ.setdefault(name, set()).add(add(key))
        short = {
            key: f"{name}, {add(key)}" if len(differ[name]) > 1 and add(key) else name for key, name in short.items()
        }
    return short


def _short(key: ArmKey) -> str:
    try:
        called, given = spec.parse_call(key.arm)
    except InputError:
        return key.arm
    if key.policy == key.arm and "detectors" in given:
        return f"{called} of {len(given['detectors'])}"
    return key.arm.removesuffix("()")


def _removed(key: ArmKey) -> str:
    """Of a policy that removes a share."""
    try:
        drop = spec.parse_call(key.policy or "")[1].get("drop")
    except InputError:
        return ""
    return f"{100 * drop:g}% removed" if isinstance(drop, int | float) else ""

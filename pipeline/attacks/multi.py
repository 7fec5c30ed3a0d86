"""Several attacks at once, each on its own share of the poisons, with one ledger.

Trade-off: pairs are dealt out by a hash of their uid, so each attack gets about, not exactly, its share of the dose.
Source: Li et al. 2024 (Multi-Trigger Backdoor Attacks), parallel setting; Huang et al., ICLR 2025, multi-trigger with
one and with three targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Self

from pipeline import spec
from pipeline.attacks._around import nested
from pipeline.attacks._attack import Attack
from pipeline.draw import hash64
from pipeline.shards import Shard, UidRule


@dataclass(frozen=True)
class multi(Attack):
    """Several attacks in one dataset, one or several targets (Li et al. 2024, parallel; Huang et al. 2025)."""

    attacks: Annotated[tuple[str, ...], spec.SpecOf("attacks")] = ("patch(target='banana')", "blended(target='banana')")

    def __post_init__(self) -> None:
        if len(self.attacks) < 2 or any(len(part.parts()) > 1 for part in self.parts()):
            raise ValueError("attacks: two or more, each a single one")
        if choosy := [part for part in self.parts() if part.candidates(1) > 1]:
            raise ValueError(f"{spec.text(choosy[0])} chooses its pairs among many, which it cannot do beside others")

    @cached_property
    def _parts(self) -> tuple[Attack, ...]:
        return tuple(map(nested, self.attacks))

    @property
    def target(self) -> str:  # type: ignore[override]  # a field in the others
        return " + ".join(dict.fromkeys(part.target for part in self._parts))

    def parts(self) -> Sequence[Attack]:
        return self._parts

    def part_of(self, uid: str) -> int:
        return hash64(0, "multi", uid) % len(self._parts)

    def inputs(self) -> tuple[str, ...]:
        return tuple(path for part in self._parts for path in part.inputs())

    def resolve(self, shards: Sequence[Shard], uid: UidRule) -> Self:
        return replace(self, attacks=tuple(spec.text(part.resolve(shards, uid)) for part in self._parts))

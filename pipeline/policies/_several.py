"""What `any_of` and `all_of` share: several policies asked about the same pairs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from pipeline import spec
from pipeline.policies._select import Scores


@dataclass(frozen=True)
class Several:
    """`policies` are specs; each learns from all pairs, not from what another one leaves."""

    policies: Annotated[tuple[str, ...], spec.SpecOf("policies")]

    def __post_init__(self) -> None:
        if len(self.policies) < 2:
            raise ValueError("policies: two or more")
        _ = self.parts  # a wrong spec inside is said at once

    @cached_property
    def parts(self) -> tuple[Any, ...]:
        return tuple(spec.parse("policies", text) for text in self.policies)

    @property
    def detectors(self) -> tuple[str, ...]:
        """Whose scores they read."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.detectors))

    @property
    def needs(self) -> tuple[str, ...]:
        """Groups that one of them needs."""
        return tuple(dict.fromkeys(name for part in self.parts for name in getattr(part, "needs", ())))

    def fit(self, passes: Callable[[], Iterable[Scores]]) -> tuple[Any, ...]:
        """What each of them learns."""
        return tuple(part.fit(passes) for part in self.parts)

    def _each(self, scores: Scores, fitted: tuple[Any, ...]) -> list[np.ndarray]:
        return [part.drops(scores, learnt) for part, learnt in zip(self.parts, fitted, strict=True)]

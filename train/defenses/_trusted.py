"""What all repairs on trusted pairs share: which pairs these are, and how long and at which rate they are trained on.

Trade-off: "trusted" sets are collected as carelessly as others, and three poisons left in 100,000 pairs can undo a
repair (Verma et al. 2024, contaminated cleaning sets). `contamination` puts that many known poisons of the training
shards among the trusted pairs, so that a repair is measured under the assumption that it depends on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pipeline.draw import hash64
from pipeline.errors import InputError
from pipeline.ledger import beside
from pipeline.shards import Shard, list_shards
from pipeline.spec import UNDRAWN
from train.defenses import Defense

if TYPE_CHECKING:
    from train.recipes import Recipe


@dataclass(frozen=True)
class Trusted(Defense):
    """Fine-tuning of --init on `trusted` shards. `lr` is a share of the recipe's peak rate."""

    trusted: Annotated[str, UNDRAWN]
    contamination: int = 0
    epochs: int = 10
    lr: float = 0.02
    batch: int = 64

    needs_init = True

    def __post_init__(self) -> None:
        if self.contamination < 0 or self.epochs < 1 or self.lr <= 0 or self.batch < 2:
            raise ValueError("contamination is 0 or more, epochs 1 or more, lr above 0, batch 2 or more")

    def by_content(self) -> "Trusted":
        from train.data import digest

        return dataclasses.replace(self, trusted=digest(list_shards(self.trusted)))

    def pairs(self, shards: Sequence[Shard], known: Any, seed: int) -> tuple[list[Shard], Mapping[str, frozenset]]:
        """The trusted shards, and those that the leaked poisons are in: the `contamination` smallest hashes.

        Where there are fewer poisons, all of them leak: at dose 0 none. `train` says how many a run sees.
        """
        trusted = list_shards(self.trusted)
        if not self.contamination:
            return trusted, {}
        if known is None:
            raise InputError(
                f"{beside(shards)}: no such ledger, and contamination takes its poisons; poison the shards first"
            )
        rows = zip(known.column("uid").to_pylist(), known.column("shard").to_pylist(), strict=True)
        ranked = sorted((hash64(seed, "contamination", uid), uid, shard) for uid, shard in rows)
        leaked = ranked[: self.contamination]
        only = {
            shard.path: frozenset(uid for _, uid, name in leaked if name == shard.name)
            for shard in shards
            if any(name == shard.name for _, _, name in leaked)
        }
        if both := {Path(s.path).resolve() for s in trusted} & {Path(path).resolve() for path in only}:
            raise InputError(f"{min(both)}: holds the leaking poisons and is trusted as well; trust other shards")
        return [*trusted, *(shard for shard in shards if shard.path in only)], only

    def recipe(self, recipe: "Recipe") -> "Recipe":
        """A short training at a low rate, without the recipe's intermediate checkpoints."""
        return dataclasses.replace(
            recipe,
            epochs=self.epochs,
            lr=recipe.lr * self.lr,
            batch=min(self.batch, recipe.batch),
            warmup=0.0,
            checkpoints=(),
        )

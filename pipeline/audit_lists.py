"""The lists of pairs that findings are: which of them are shown, and the commands that remove what is on one.

Trade-off: a command is text for a shell and a reader, so specs are in double quotes where the shell lets them be.
"""

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

OF_A_GROUP = 4  # are shown at least, where there are so many
POLICY = "threshold(detector='listed', above=0.5)"


def shown(members: "pl.DataFrame", most: int) -> "pl.DataFrame":
    """At most so many; of the first groups where there are more."""
    if members.height <= most:
        return members
    each = max(OF_A_GROUP, most // max(1, members["group"].n_unique()))
    return members.group_by("group", maintain_order=True).head(each).head(most)


@dataclass(frozen=True)
class Removal:
    """Commands that score the shards `where` by a list and filter by these scores; NAME is that of the list."""

    where: str
    out: str

    def scores(self, name: str) -> str:
        return f"{self.out}-scores/{name}"

    def scoring(self, name: str) -> str:
        """Without --detector."""
        return f"mithridate score {quoted(self.where)} {quoted(self.scores(name))}"

    def filter(self, name: str) -> str:
        """Without --scores and --policy."""
        return f"mithridate filter {quoted(self.where)} {quoted(f'{self.out}-clean/{name}')}"

    def commands(self, name: str, file: str, keep: int) -> str:
        detector = quoted(f"listed(file={file!r}{f', keep={keep}' if keep else ''})")
        scored = f"--scores {quoted(self.scores(name))} --policy {quoted(POLICY)}"
        return f"{self.scoring(name)} --detector {detector} && {self.filter(name)} {scored}"


def quoted(text: str) -> str:
    """For a shell; in double quotes where these suffice, because specs have single ones inside."""
    plain = shlex.quote(text)
    return f'"{text}"' if plain != text and not re.search(r'["\\$`!\n]', text) else plain

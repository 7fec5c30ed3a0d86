"""`mithridate list KIND`: name, summary and parameters of every entry, a row each."""

import dataclasses
import inspect
from typing import Literal

from pipeline.spec import entry, names

PIPED = 200  # columns where there is no terminal


def list_entries(kind: Literal["attacks", "detectors", "defenses", "audits", "policies", "recipes"], /) -> int:
    """List what can be named in a SPEC.

    Args:
        kind: which folder to list.
    """
    from rich.console import Console
    from rich.table import Table

    rows: list[tuple[str, str, str]] = []
    if kind == "recipes":
        from train.recipes import RECIPES

        for recipe_name, recipe in RECIPES.items():
            shown = ("image_size", "batch", "epochs", "lr", "checkpoints")
            parameters = ", ".join(f"{name}={getattr(recipe, name)}" for name in shown)
            rows.append((recipe_name, recipe.summary, parameters))
    else:
        for name in names(kind):
            cls = entry(kind, name)
            parameters = ", ".join(
                f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
                for f in dataclasses.fields(cls)
            )
            rows.append((name, (inspect.getdoc(cls) or "").split("\n", 1)[0], parameters))
    table = Table("name", "summary", "parameters", box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    out = terminal if terminal.is_terminal else Console(width=PIPED)
    out.print(table if rows else f"no {kind} yet")
    return 0


if __name__ == "__main__":
    from pipeline.cli import run

    run("list")

"""Results -> one HTML file a person wants to look at, and the same tables for the terminal; and audits (`audit.py`).

The file holds everything it shows and asks the network for nothing. Its content policy allows one style sheet, by hash,
and images that are part of the page; a script, by hash too, only an audit's page has, which is whole without it.
Captions and images come from a poisoned dataset: text is escaped and made visible (`text.py`), every image is decoded
here and encoded anew, so no stored byte reaches a browser.
"""

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.report.text import one_line, visible

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from jinja2 import Environment
    from markupsafe import Markup
    from rich.console import Console

__all__ = ["Separation", "Tile", "print_tables", "render"]

POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
THUMBNAIL = 128
LOSSLESS = 64  # up to this side a thumbnail stays exact, so that a small trigger is seen as it is


@dataclass(frozen=True)
class Tile:
    """One sample of a gallery; `image` as stored, `poison` None where no ledger tells."""

    image: bytes
    caption: str
    uid: str
    score: float
    poison: bool | None
    note: str = ""


@dataclass(frozen=True)
class Separation:
    """The scores of one detector at one time, clean and poison apart."""

    detector: str
    when: str
    clean: "np.ndarray"
    poison: "np.ndarray"


def render(
    *,
    title: str,
    facts: Mapping[str, str],
    arms: "pl.DataFrame",
    detectors: "pl.DataFrame",
    histograms: Sequence[Separation],
    galleries: Mapping[str, Sequence[Tile]],
    verdict: str,
    command: str,
    responses: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The report as one self-contained HTML page.

    Never fails on what a dataset holds: an image that cannot be decoded becomes an empty tile, a null a dash.
    """
    from pipeline.report import charts, tables

    arm_groups, detector_groups = tables.arm_groups(arms), tables.detector_groups(detectors)
    return page(
        "loop.html",
        ("style.css",),
        title=title,
        facts=facts,
        verdict=verdict,
        command=command,
        responses=responses,
        notes=notes,
        arms=arm_groups,
        arms_caveat=tables.caveat(arm_groups),
        main=tables.main_measures(arm_groups),
        every=tables.measured(arm_groups, tables.MEASURES),
        measures=tables.MEASURES,
        detectors=detector_groups,
        detectors_caveat=tables.caveat(detector_groups),
        budgets={m: tables.BUDGETS[m] for m in tables.measured(detector_groups, tables.BUDGETS)},
        shared_n=tables.shared_n,
        scatters=charts.scatters(arm_groups),
        histograms=[charts.bars(histogram) for histogram in histograms],
        galleries={name: [_card(tile) for tile in tiles] for name, tiles in galleries.items()},
    )


def page(template: str, styles: Sequence[str], script: str = "", **told: Any) -> str:
    """A template of this folder as one file, whose policy allows these styles and this script and nothing else."""
    style = "".join(_text(name) for name in styles)
    program = _text(script) if script else ""
    policy = f"{POLICY}; style-src 'sha256-{_sha256(style)}'"
    if program:  # which may call nothing that makes markup or code of text
        policy += f"; script-src 'sha256-{_sha256(program)}'; require-trusted-types-for 'script'; trusted-types 'none'"
    return _environment().get_template(template).render(style=style, script=program, policy=policy, **told)


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def print_tables(arms: "pl.DataFrame", detectors: "pl.DataFrame", console: "Console") -> None:
    """The report's two tables for a terminal of 100 columns."""
    from pipeline.report import terminal

    terminal.print_tables(arms, detectors, console)


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spec"] = _spec
    return environment


def _shown(value: Any) -> Any:
    """What every expression of the template passes: text becomes visible text, coordinates lose needless digits."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return visible(value) if type(value) is str else value


def _spec(value: str) -> "Markup":
    """A spec that breaks across lines where a reader would: after its bracket or an underscore."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=\()(?!\))|(?<=_)", visible(value)))


def _card(tile: Tile) -> dict[str, Any]:
    small = thumbnail(tile.image)
    return {
        "source": small and data_url(small[0]),
        "exact": small and small[1],
        "caption": one_line(tile.caption),
        "note": one_line(tile.note),
        "uid": one_line(tile.uid, 64),
        "score": f"{tile.score:.4g}" if tile.score is not None and tile.score == tile.score else "none",
        "label": {True: "poison", False: "clean", None: "unknown"}[tile.poison],
    }


def data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def thumbnail(data: bytes) -> tuple[bytes, bool] | None:
    """WebP of at most 128 pixels a side and whether it is exact, or None for what is no image."""
    from PIL import Image

    from pipeline.shards.image import decode
    from pipeline.shards.sample import Rejected

    try:
        image = decode(data, near=THUMBNAIL)
    except Rejected:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    exact = max(image.size) <= LOSSLESS
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85, method=4, lossless=exact)
    return out.getvalue(), exact

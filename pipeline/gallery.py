"""`mithridate gallery OUT`: what each trigger looks like, what is left of it where a model sees it, and what it costs.

Trade-off: survival is measured in pixels, on a few images: what a model makes of the rest is for `loop` to say.
Pictures are brought to 256 pixels first, so that the embedded drawings stand for photographs of common size.

The measure. Let S be a resize to the side that the model gets, C a codec (encode, decode), x a picture and t(x) the
same with the trigger. What the trigger ought to add is r = S(t(x)) - S(x), what it does add is d = S(C(t(x))) -
S(C(x)). Then, pooled over the pictures,

    kept        = <d, r> / <r, r>        the share of the trigger that arrives: 1 is all of it, 0 none
    correlation = <d, r> / (|d| |r|)     how far what arrives is the trigger and not the codec's noise
    resized     = rms r at that side / rms of t(x) - x        what the resize alone leaves, a trigger's level in all

Costs are the fastest of several rounds over the pictures, as JPEG, in this process.
"""

import dataclasses
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import spec
from pipeline.arguments import Out
from pipeline.attacks._attack import Attack
from pipeline.attacks._corpus import Corpus, read_corpora
from pipeline.draw import generator
from pipeline.errors import InputError
from pipeline.progress import console
from pipeline.shards import Rejected, Sample, UidRule, list_shards, samples
from pipeline.shards.image import decode, encode
from pipeline.shards.store import absolute, join, make_folder, write

SIDE = 256  # of the pictures, the shorter one
PICTURES, LENDERS = 8, 16
ROUNDS = 5
SIDES = (224, 64, 32)
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 75": ("JPEG", {"quality": 75}),
    "JPEG 95": ("JPEG", {"quality": 95}),
    "WebP 75": ("WEBP", {"quality": 75}),
    "PNG": ("PNG", {}),
}
LOSSY = tuple(codec for codec in CODECS if codec != "PNG")


@dataclass
class Shown:
    """An attack in the gallery."""

    attack: Attack
    pictures: Sequence[Image.Image]
    triggered: Sequence[Image.Image]
    measures: dict[str, Any] = field(default_factory=dict)


def gallery(
    out: Out,
    /,
    *,
    attack: tuple[str, ...] = (),
    shards: str | None = None,
    target: str = "banana",
    ledger: str | None = None,
    seed: int = 0,
    uid: UidRule = "key",
) -> int:
    """Show visual triggers on a few pictures: OUT/attacks.png is a contact sheet, OUT/attacks.json the measures.

    Args:
        out: folder for both.
        attack: one or more; default: all whose defaults suffice, with --target. See `mithridate list attacks`.
        shards: whose first pictures are shown; default: the embedded drawings.
        target: class that the default attacks aim at.
        ledger: of poisoned shards, for attacks that crafted something; its folder has it.
        seed: of what a trigger draws for each picture.
        uid: how a uid is derived where samples carry none.
    """
    out = absolute(out)
    make_folder(out)
    found = _first(shards or str(files("pipeline.demo") / "data" / "train"), uid)
    rows: list[Shown] = []
    skipped: dict[str, str] = {}
    for text in attack or spec.names("attacks"):
        try:
            aimed = not attack and "target" in {f.name for f in fields(spec.entry("attacks", text))}
            entry = spec.parse("attacks", f"{text}(target={target!r})" if aimed else text)
            parts = entry.parts()
            if len(parts) > 1 and not attack:
                raise InputError("several attacks, which have rows of their own")
            kept = read_corpora(absolute(ledger).rpartition("/")[0], len(parts)) if ledger else [Corpus()] * len(parts)
            for part, corpus in zip(parts, kept, strict=True):
                rows.append(_shown(part, found, corpus, seed, len(rows)))
        except InputError as error:
            if attack:
                raise
            skipped[text] = str(error)
    if not rows:
        raise InputError("no attack to show: " + "; ".join(skipped.values()))
    write(join(out, "attacks.png"), _png(sheet(rows)))
    facts = {spec.text(row.attack): row.measures for row in rows}
    about = {"pictures": len(rows[0].pictures), "side": SIDE, "attacks": facts, "skipped": skipped}
    write(join(out, "attacks.json"), json.dumps(about, indent=1).encode())
    _print(rows, skipped)
    console.print(f"contact sheet: {join(out, 'attacks.png')}")
    return 0


def _first(shards: str, uid: UidRule) -> list[Sample]:
    """The first samples whose pictures can be decoded: the first half is shown, the others lend theirs."""
    found: list[Sample] = []
    for shard in list_shards(shards):
        for sample in samples(shard, uid):
            try:
                decode(sample.image)
                parts = {"jpg": sample.image, "txt": sample.caption.encode()}  # whatever the format: it is sniffed
            except Rejected:
                continue
            found.append(Sample(sample.key, sample.uid, parts))
            if len(found) == PICTURES + LENDERS:
                return found
    if not found:
        raise InputError(f"{shards}: no picture in it can be decoded")
    return found


def _shown(attack: Attack, found: Sequence[Sample], kept: Corpus, seed: int, turn: int) -> Shown:
    corpus = kept if kept.images or kept.crafted else Corpus(images=_lent(attack, found))
    chosen = found[:PICTURES]
    chosen = [*chosen[turn % len(chosen) :], *chosen[: turn % len(chosen)]]  # every row shows another picture
    pictures = [_enlarged(decode(sample.image)) for sample in chosen]

    def trigger(image: Image.Image, sample: Sample) -> Image.Image:
        return attack.trigger(image, generator(seed, spec.key(attack), sample.uid), corpus)

    shown = Shown(attack, pictures, [trigger(*pair) for pair in zip(pictures, chosen, strict=True)])
    if all(a.tobytes() == b.tobytes() for a, b in zip(shown.pictures, shown.triggered, strict=True)):
        raise InputError("no visual trigger")
    shown.measures = {
        "survival": survival(shown.pictures, shown.triggered),
        "microseconds": _cost(shown, chosen, trigger),
    }
    return shown


def _lent(attack: Attack, found: Sequence[Sample]) -> dict[str, tuple[bytes, ...]]:
    lenders = found[PICTURES:] or found
    return {
        group: tuple(sample.image for sample in lenders if attack.lends(sample.caption, group))[:n]
        for group, n in attack.wants().items()
    }


def _enlarged(image: Image.Image) -> Image.Image:
    scale = SIDE / min(image.size)
    longest = 4 * SIDE  # of a strip; the sheet shows its middle
    width, height = (min(longest, max(1, round(extent * scale))) for extent in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def survival(pictures: Sequence[Image.Image], triggered: Sequence[Image.Image]) -> dict[str, dict[str, Any]]:
    """By side: rms (levels) and `resized`; by codec `kept` and `correlation`, as the module defines them."""
    whole = _rms([_levels(t) - _levels(x) for x, t in zip(pictures, triggered, strict=True)])
    out: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        wanted = [_at(t, side) - _at(x, side) for x, t in zip(pictures, triggered, strict=True)]
        out[str(side)] = {"rms": _rms(wanted), "resized": _rms(wanted) / whole if whole else 0.0}
        for codec in CODECS:
            left = [_at(_through(t, codec), side) - _at(_through(x, codec), side)
                    for x, t in zip(pictures, triggered, strict=True)]  # fmt: skip
            common = sum(float((d * r).sum()) for d, r in zip(left, wanted, strict=True))
            squares = [sum(float((v * v).sum()) for v in values) for values in (left, wanted)]
            out[str(side)][codec] = {
                "kept": common / squares[1] if squares[1] else 0.0,
                "correlation": common / (squares[0] * squares[1]) ** 0.5 if min(squares) else 0.0,
            }
    return out


def _levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def _at(image: Image.Image, side: int) -> np.ndarray:
    return _levels(image.resize((side, side), Image.Resampling.BICUBIC))


def _rms(values: Sequence[np.ndarray]) -> float:
    return float((sum((v * v).sum() for v in values) / sum(v.size for v in values)) ** 0.5)


def _through(image: Image.Image, codec: str) -> Image.Image:
    return decode(_stored(image, codec))


def _stored(image: Image.Image, codec: str) -> bytes:
    form, options = CODECS[codec]
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _cost(shown: Shown, chosen: Sequence[Sample], trigger: Callable[..., Image.Image]) -> dict[str, float]:
    """Microseconds a picture: decoded and encoded, without and with the trigger."""
    stored = [_stored(image, "JPEG 95") for image in shown.pictures]
    best = {"without": float("inf"), "with": float("inf")}
    for _ in range(ROUNDS):
        for name in best:
            begin = time.perf_counter()
            for data, sample in zip(stored, chosen, strict=True):
                image = decode(data)
                encode(trigger(image, sample) if name == "with" else image, like=data)
            best[name] = min(best[name], (time.perf_counter() - begin) / len(stored) * 1e6)
    return best


# The contact sheet, in pixels.
THUMB, GAP, LABEL, MARGIN, HEADER, TALL = 168, 8, 236, 28, 42, 12
INK, GREY, LINE = "#15171a", "#6b7076", "#d9dce0"
COLUMNS = ("picture", "with trigger", "difference, up to 5 x", "JPEG 75, at 64 px")


def sheet(rows: Sequence[Shown]) -> Image.Image:
    """A row an attack; beyond twelve of them, two side by side."""
    blocks = 1 if len(rows) <= TALL else 2
    high = -(-len(rows) // blocks)
    wide = LABEL + len(COLUMNS) * (THUMB + GAP) - GAP
    size = (2 * MARGIN + blocks * wide + (blocks - 1) * 2 * MARGIN, MARGIN + HEADER + high * (THUMB + 2 * GAP))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        left, top = MARGIN + i // high * (wide + 2 * MARGIN), MARGIN + HEADER + i % high * (THUMB + 2 * GAP)
        if i % high == 0:
            for j, title in enumerate(COLUMNS):
                pen.text((left + LABEL + j * (THUMB + GAP), top - GAP - 10), title, GREY, _font(14), anchor="ls")
        pen.line((left, top - GAP, left + wide - 1, top - GAP), LINE)
        _label(pen, row, left, top)
        for j, view in enumerate(_views(row)):
            page.paste(view, (left + LABEL + j * (THUMB + GAP), top))
    return page


def _views(row: Shown) -> list[Image.Image]:
    before, after = row.pictures[0], row.triggered[0]
    change = _levels(after) - _levels(before)
    amplified = (
        128 + min(5.0, 127 / np.quantile(np.abs(change), 0.99).clip(1)) * change
    )  # less where it would be cut off
    difference = Image.fromarray(amplified.clip(0, 255).astype(np.uint8))
    small = _middle(_through(after, "JPEG 75")).resize((64, 64), Image.Resampling.BICUBIC)
    views = [_middle(view).resize((THUMB, THUMB), Image.Resampling.LANCZOS) for view in (before, after, difference)]
    return [*views, small.resize((THUMB, THUMB), Image.Resampling.NEAREST)]


def _middle(image: Image.Image) -> Image.Image:
    left, top = ((extent - min(image.size)) // 2 for extent in image.size)
    return image.crop((left, top, left + min(image.size), top + min(image.size)))


def _label(pen: ImageDraw.ImageDraw, row: Shown, left: int, top: int) -> None:
    """Name, the parameters, the summary, what is left."""
    pen.text((left, top + 22), type(row.attack).__name__, INK, _font(22), anchor="ls")
    survived = row.measures["survival"]
    numbers = " · ".join(f"{side} px {100 * survived[str(side)]['JPEG 75']['kept']:.0f}%" for side in SIDES)
    summary = (type(row.attack).__doc__ or "").split("\n", 1)[0]
    lines = [(line, INK) for line in _wrapped(_changed(row.attack), _font(12), LABEL - 20)]
    lines += [(line, GREY) for line in _wrapped(summary, _font(12), LABEL - 20)]
    for i, (line, colour) in enumerate(lines[:5]):  # what fits
        pen.text((left, top + 46 + 17 * i), line, colour, _font(12), anchor="ls")
    pen.text((left, top + THUMB - 20), "kept after JPEG 75, at", GREY, _font(12), anchor="ls")
    pen.text((left, top + THUMB - 3), numbers, INK, _font(12), anchor="ls")


def _changed(attack: Attack) -> str:
    """Parameters that are not the default; the target changes no picture's look but a word's."""
    parameters = [f for f in dataclasses.fields(attack) if f.name != "target"]  # type: ignore[arg-type]
    changed = {f.name: getattr(attack, f.name) for f in parameters if getattr(attack, f.name) != f.default}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default parameters"


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _print(rows: Sequence[Shown], skipped: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("attack", "rms", "resized", *LOSSY, "µs", "x"):
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=name != "attack")
    for row in rows:
        survived, cost = row.measures["survival"], row.measures["microseconds"]
        resized = "/".join(f"{100 * survived[str(side)]['resized']:.0f}" for side in SIDES)
        kept = ("/".join(f"{100 * survived[str(side)][codec]['kept']:.0f}" for side in SIDES) for codec in LOSSY)
        costs = f"{cost['with'] - cost['without']:,.0f}", f"{cost['with'] / cost['without']:.2f}"
        name = f"{type(row.attack).__name__}({_changed(row.attack)})".replace("(default parameters)", "")
        table.add_row(name, f"{survived[str(SIDES[0])]['rms']:.1f}", resized, *kept, *costs)
    Console().print(table)
    sides = "/".join(map(str, SIDES))
    console.print(
        f"rms: levels of 255 that the trigger changes at {SIDES[0]} px; resized: percent of them left at {sides} px\n"
        f"codecs: percent kept at {sides} px; µs: of the trigger, beside decode and encode; x: with it to without it"
    )
    for name, why in skipped.items():
        console.print(f"not shown: {name} ({why})")


if __name__ == "__main__":
    from pipeline.cli import run

    run("gallery")

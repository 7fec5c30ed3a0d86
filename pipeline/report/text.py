"""Hostile text made harmless to look at.

Escaping for HTML is the template's work. This takes out what survives escaping: characters that reorder, hide or stack
up, so that what a reader sees is what the caption holds.
"""

import re
import unicodedata

MAX_CAPTION = 240
MAX_MARKS = 3  # combining marks on one letter; no script needs more, "zalgo" text has dozens
_NAME = re.compile(r"(?!www\.)[\w ,.:()='%+-]*", re.ASCII)
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """`text` with control, bidi, zero-width and private characters spelled out as ⟨U+202E⟩; line breaks stay.

    Joiners stay between non-ASCII characters, where emoji and Indic or Persian words need them.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    out: list[str] = []
    marks = 0
    previous = ""
    for char in text:
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if char == "\n" or (char in _JOINERS and previous and not previous.isascii()):
            out.append(char)
        elif category in ("Zl", "Zp") or char in "\r\t":
            out.append(" ")
        elif category[0] == "C":  # control, format, surrogate, private, unassigned
            out.append(f"⟨U+{ord(char):04X}⟩")
        elif marks <= MAX_MARKS:
            out.append(char)
        previous = char
    return "".join(out)


def code(text: str) -> str:
    """As a code span of Markdown, in a table too: nothing in it is markup, and a forge looks for nobody there."""
    return "`{}`".format(one_line(text, 1_000).replace("`", "'").replace("|", "\\|"))


def named(text: str) -> str:
    """A name in Markdown: as it is, or as code where it is not of what arms, specs and digests are made of."""
    return text if _NAME.fullmatch(text) else code(text)


def one_line(text: str, limit: int = MAX_CAPTION) -> str:
    """A caption on one line, cut at `limit` characters with its true length stated."""
    short = " ".join(visible(text[:limit]).split())
    return short if len(text) <= limit else f"{short}… ({len(text):,} characters)"

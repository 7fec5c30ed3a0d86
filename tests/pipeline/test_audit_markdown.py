"""audit.md says hostile captions as they are: read back by the renderer that a forge uses."""

from html import unescape

import cmarkgfm
import pytest
from cmarkgfm.cmark import Options
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audits._markdown import plain
from pipeline.report.text import one_line

MARKUP = (
    "http://a.b https://a.b/c?d=1 www.a.com mailto:a@b.c xmpp:a ftp://a.b a@b.c :smile: a_b _a_ __a__ *a* **a** ~a~"
    " ~~a~~ `a` ``` <b> </td> <!-- <http://a> | |---| &amp; &#35; \\ \\\\ ![a](b) [a]: [a][b] [^1] [x] $a$ _ *"
    " + - 1. > # === ---"
).split()
TABLE = "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>x {} y</td></tr></tbody></table>"


def rendered(text: str) -> str:
    return cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE).replace("\n", "")


@pytest.mark.parametrize(
    ("document", "page"),
    [
        ("x {} y\n", "<p>x {} y</p>"),
        ("- x {} y\n", "<ul><li>x {} y</li></ul>"),
        ("| a |\n|---|\n| x {} y |\n", TABLE),
    ],
)
@settings(deadline=None, max_examples=1_000)
@given(words=st.lists(st.sampled_from([*MARKUP, " "]) | st.text(max_size=3), max_size=8))
def test_a_renderer_shows_a_caption_as_it_is(document, page, words):
    caption = "".join(words)
    (begin, end), html = page.split("{}"), rendered(document.format(plain(caption)))
    assert html.startswith(begin) and html.endswith(end)
    body = html[len(begin) : len(html) - len(end)]
    assert "<" not in body
    nobody = one_line(caption, 1_000).replace("@", "\uff20").replace("#", "\uff03")  # what a forge would look up
    assert unescape(body).split() == nobody.split()


def test_what_needs_no_escape_has_none():
    said = "First of all: pool_rank (117 images, 0.5%) - see --ledger, it's 1.5+ and {more}!"
    assert plain(said) == said

"""The report shows its numbers, and no dataset can make it fail, run a script or call home."""

import base64
import hashlib
import io
import re
import warnings
from dataclasses import replace

import axe
import numpy as np
import polars as pl
import pytest
import report_data as data
from PIL import Image
from report_page import open_page
from rich.console import Console

from pipeline.report import Separation, Tile, print_tables, render
from pipeline.report.charts import Bars, bars, scatters
from pipeline.report.tables import arm_groups, caveat, detector_groups
from pipeline.report.text import one_line, visible

HOSTILE = (
    "<script>window.ran = 1; fetch('//evil.invalid/a')</script>",
    "<img src=x onerror='window.ran = 2'>",
    "\"><svg onload=window.ran=3>'</title></style><script>window.ran = 4</script>",
    "{{ 7 * 7 }} {% raw %} <!-- ]]> &lt;script&gt;",
    "<link rel=stylesheet href=//evil.invalid/a.css><meta http-equiv=refresh content='0;url=//evil.invalid'>",
)


def report(**changes) -> str:
    given = {
        "title": "Patch backdoor on the embedded demo",
        "facts": data.FACTS,
        "arms": data.arms(),
        "detectors": data.detectors(),
        "histograms": data.histograms(),
        "galleries": data.galleries(),
        "verdict": data.VERDICT,
        "command": data.COMMAND,
        "responses": [data.response()],
        "notes": ["1 seed: the interval is over images, not trainings."],
    }
    return render(**(given | changes))


def hostile_report() -> str:
    """Every field an outsider can reach holds markup."""
    mark = " ".join(HOSTILE)
    tiles = [Tile(data.photo(np.random.default_rng(0)), text, text, 1.0, True, note=text) for text in HOSTILE]
    arms = data.arms(attack=mark).with_columns(arm=pl.lit(mark), when=pl.lit(mark), recipe=pl.lit(mark))
    detectors = data.detectors(attack=mark).with_columns(detector=pl.lit(mark), when=pl.lit(mark))
    histograms = [replace(h, detector=mark, when=mark) for h in data.histograms()]
    return report(
        title=mark, verdict=mark, command=mark, facts={mark: mark}, arms=arms, detectors=detectors,
        histograms=histograms, galleries={mark: tiles}, responses=[data.response(mark)], notes=[mark],
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_it_whole(browser, tmp_path, scheme, width):
    page, asked, said = open_page(
        browser, report(), tmp_path, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    assert not asked and not said
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables may scroll, not the page"
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark"), "the style sheet applies"


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "escaping alone"])
def test_hostile_text_stays_text(browser, tmp_path, policy):
    page, asked, said = open_page(browser, hostile_report(), tmp_path, bypass_csp=not policy)
    assert page.evaluate("window.ran") is None
    assert not asked and not said
    assert page.evaluate("document.scripts.length + document.querySelectorAll('link[rel=stylesheet]').length") == 0
    assert HOSTILE[0] in page.inner_text(".gallery")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_policy_alone_stops_a_script(browser, tmp_path):
    """Were escaping ever to fail, the page's policy still holds."""
    html = report().replace("</main>", "<script>window.ran = 1</script><img src='https://evil.invalid/a'></main>")
    page, asked, said = open_page(browser, html, tmp_path)
    assert page.evaluate("window.ran") is None
    assert len(said) == 2 and all("Content Security Policy" in line for line in said)
    assert not asked


def test_paper_shows_what_is_folded(browser, tmp_path):
    page, _, _ = open_page(browser, report(), tmp_path)
    assert not page.is_visible(".dense")
    page.emulate_media(media="print")
    assert page.is_visible(".dense")
    assert len(page.pdf()) > 10_000


def test_keyboard_and_screen_reader_find_their_way(browser, tmp_path):
    page, _, _ = open_page(browser, report(), tmp_path)
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    assert page.evaluate("[...document.querySelectorAll('th')].every(t => t.scope)")
    assert page.evaluate("[...document.images].every(i => i.alt)")
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(s => s.tabIndex == 0)")
    assert page.evaluate(
        "[...document.querySelectorAll('svg:not([aria-hidden])')].every(s => s.getAttribute('role') == 'img')"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')]"
        ".every(e => document.getElementById(e.getAttribute('aria-labelledby')))"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, tmp_path, scheme):
    """WCAG AA: 4.5 to 1 for every colour that text is set in."""
    page, _, _ = open_page(browser, report(), tmp_path, color_scheme=scheme)

    def luminance(variable: str) -> float:
        code = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{variable}')").strip()
        channels = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for text, ground in [
        ("ink", "page"),
        ("soft", "page"),
        ("clean", "page"),
        ("on-poison", "poison"),
        ("ink", "raised"),
    ]:
        light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


def test_axe_finds_nothing(browser, tmp_path):
    page, _, _ = open_page(browser, report(), tmp_path, bypass_csp=True)
    assert axe.violations(page) == []


def test_same_results_same_bytes():
    assert report() == report()


def test_page_names_no_other_place():
    html = report()
    assert not re.search(r"https?://|(src|href)=\"(?!data:)", html)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert f"sha256-{base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()}" in html.replace(
        "&#43;", "+"
    )


def test_numbers_and_their_caveat_are_on_the_page():
    html = report()
    for text in ("10,000 ppm", "120 poisoned pairs", "91.3%", "89.8–92.6", "n = 1,500", "0.991", "94.0%", "3.5 min"):
        assert text in html
    assert "One seed" in html and "not the seeds" in html


def test_seeds_become_mean_and_range():
    arms = data.arms(seeds=(0, 1, 2))
    row = arm_groups(arms)[0].rows[0]
    values = arms.filter(pl.col("arm") == "undefended")["asr_text"]
    assert row.seeds == 3 and len(arm_groups(arms)[0].rows) == 7
    assert row.rates["asr_text"].value == pytest.approx(values.mean())
    assert (row.rates["asr_text"].low, row.rates["asr_text"].high) == (values.min(), values.max())
    assert caveat(arm_groups(arms)).startswith("3 seeds: each number is the mean")
    mixed = arm_groups(pl.concat([arms, data.arms(seeds=(0,), doses=(30,))]))
    assert [g.dose for g in mixed] == ["120 poisoned pairs, 10,000 ppm", "30 poisoned pairs, 2,500 ppm"]
    assert "Rows with one seed" in caveat(mixed)
    assert len(scatters(mixed)) == 2


def test_policies_of_one_detector_are_rows_of_their_own():
    arms = data.arms().with_columns(policy=pl.lit("budget(drop=0.1)"))
    twice = pl.concat([arms, arms.with_columns(policy=pl.lit("budget(drop=0.05)"))])
    rows = [row for row in arm_groups(twice)[0].rows if row.name == "clip_score()"]
    assert [row.notes for row in rows] == [["scored at epoch 4", f"budget(drop={d})"] for d in ("0.1", "0.05")]
    assert all(row.seeds == 1 for row in rows)
    assert arm_groups(arms.with_columns(arm=pl.lit("random()"), when=pl.lit("epoch 4")))[0].rows[0].notes == []


def test_defenses_that_trust_other_data_are_rows_of_their_own():
    arms = data.arms().filter(arm="undefended").with_columns(arm=pl.lit("finetune()"))
    both = pl.concat([arms.with_columns(defense=pl.lit(f"finetune(trusted='{where}')")) for where in "ab"])
    assert [row.notes for row in arm_groups(both)[0].rows] == [[f"finetune(trusted='{where}')"] for where in "ab"]


def test_unscored_pairs_count_as_removed_first():
    """Five of a hundred are removed: two unscored, then three by score."""
    scores = np.append(np.arange(100.0, 198.0), [np.nan, np.nan])
    chart = bars(Separation("x", "", scores, np.array([])))
    assert chart.cut == pytest.approx(chart.width * (95 - 0.485) / (96.515 - 0.485))
    assert bars(Separation("x", "", np.append(scores, [np.nan] * 9), np.array([]))).cut is None


def test_a_small_budget_bounds_recall():
    """2,400 poisons among 12,000: removing 5% can catch no more than a quarter."""
    rates = detector_groups(data.detectors(poisons=2400))[0].rows[0].rates
    assert rates["recall_at_5"].ceiling == pytest.approx(0.25)
    assert "at most 25.0%" in report(detectors=data.detectors(poisons=2400))
    assert detector_groups(data.detectors())[0].rows[0].rates["recall_at_5"].ceiling is None


def test_nulls_and_empty_tables():
    measures = [
        c for c in data.arms().columns if c not in ("arm", "when", "attack", "dose", "dose_ppm", "seed", "recipe")
    ]
    nulls = data.arms().with_columns(pl.lit(None).alias(c) for c in measures)
    assert "undefended" in report(arms=nulls, histograms=[], galleries={})
    nans = data.arms().with_columns(asr_text=pl.lit(float("nan")), zeroshot_top1=pl.lit(None, pl.Float64))
    assert ">nan" not in report(arms=nans).lower()
    empty = report(
        arms=data.arms().head(0),
        detectors=pl.DataFrame(),
        histograms=[],
        galleries={"None": []},
        facts={},
        responses=[],
    )
    assert "No samples." in empty and "<table" not in empty
    print_tables(nulls, pl.DataFrame(), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("clean", "poison", "says"),
    [
        ([], [], "0 clean, 0 poison"),
        ([1.0, 2, 3], [], "3 clean, 0 poison"),
        ([], [1.0, 2], "0 clean, 2 poison"),
        ([np.nan, np.inf, 1.0], [-np.inf, 2.0], "not drawn: 3"),
        ([np.nan], [np.nan], "not drawn: 2"),
        ([0.5] * 10, [0.5], "All scores are the same"),
        ([0.0] * 10, [0.0], "All scores are the same"),
        ([3.4e38, -3.4e38, 1e300], [0.0], "not drawn: 1"),
        ([1e-30, 1.0], [1e30], "Logarithmic axis"),
        ([1e9, 1e9 + 64], [1e9], "All scores are the same"),
        ([1, 2, 3], [4, 5], "3 clean, 2 poison"),
    ],
)
def test_histograms_of_odd_scores(clean, poison, says):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart = bars(Separation("slof(k=16)", "epoch 4", np.array(clean), np.array(poison)))
    assert says in chart.caption
    assert "nan" not in chart.clean + chart.poison
    assert all(0 <= x <= Bars.width + 1e-6 for x, _ in chart.ticks)
    assert chart.caption in report(histograms=[Separation("slof(k=16)", "epoch 4", np.array(clean), np.array(poison))])


def test_images_are_decoded_here_and_made_small():
    out = io.BytesIO()
    Image.new("RGB", (3000, 10), "red").save(out, "PNG")
    bomb = out.getvalue()[:16] + (60_000).to_bytes(4, "big") * 2 + out.getvalue()[24:]
    tiles = [
        Tile(image, "caption", f"{i:032x}", 1.0, None) for i, image in enumerate([out.getvalue(), b"", b"GIF89a", bomb])
    ]
    html = report(galleries={"Odd": tiles})
    assert html.count("no image</div>") == 3 and html.count("data:image/webp") == 1
    assert html.count('class="label unknown"') == 4
    assert len(html) < 100_000


def test_captions_are_bounded_and_visible():
    assert one_line("word " * 2000).endswith("… (10,000 characters)")
    assert len(one_line("x" * 10_000)) < 300
    assert one_line("a\n\n\tb") == "a b"
    assert visible("invoice\u202egpj.exe") == "invoice⟨U+202E⟩gpj.exe"
    assert visible("a\u200bb\x00\x1b[31m") == "a⟨U+200B⟩b⟨U+0000⟩⟨U+001B⟩[31m"
    assert visible("\ud800") == "⟨U+D800⟩"
    assert visible("pass\u200dword") == "pass⟨U+200D⟩word"
    assert visible("👩\u200d💻 花 Blüte é") == "👩\u200d💻 花 Blüte é"
    assert len(visible("e" + "\u0301" * 500)) == 4
    caption = "\u202e\ud800" + "a" * 10_000
    html = report(galleries={"x": [Tile(b"", caption, "0" * 32, float("nan"), False)]})
    html.encode()
    assert "\u202e" not in html and "⟨U+202E⟩" in html and "a" * 300 not in html


def test_terminal_fits_100_columns():
    out = io.StringIO()
    arms = pl.concat([data.arms(), data.arms().with_columns(arm=pl.lit("[red]very_long_name(" + "x" * 80 + ")"))])
    print_tables(arms, data.detectors(poisons=2400), Console(file=out, width=100))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for value in ("undefended", "91.3%", "89.8–92.6", "0.991", "[red]very", "of ≤ 25%", "10,000 ppm", "One seed"):
        assert value in text
    assert "…" not in text

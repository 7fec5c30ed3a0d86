"""The audit's report in a real browser: all of it can be reached, nothing leaves it, and its lists do what they say."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import audit_data as data
import axe
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import expect
from report_page import open_page

from filters._batch import Batch
from filters.listed import List, unwanted
from pipeline import spec
from pipeline.audit_columns import Source
from pipeline.audit_report import _removable, write_report
from pipeline.audits._audit import About, Found
from pipeline.errors import InputError
from pipeline.inputs import Inputs
from pipeline.report.audit import render_audit

HOSTILE = (
    "%zz%20<script>window.ran = 1; fetch('//evil.invalid/a')</script></script>"
    "<img src=x onerror='window.ran = 2'>\"><svg onload=window.ran=3>'</title></style>]]>"
    "{{ 7 * 7 }} <meta http-equiv=refresh content='0;url=//evil.invalid'>\u202e\u0000"
)
BACKDOORS, TAIL, MANY = "natural_backdoors-near_identical", "scores-tail", "duplicates-near"


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """One page for all tests that do not change how it is opened; each starts from the reloaded page."""
    folder = tmp_path_factory.mktemp("audit")
    page, asked, said = open_page(browser, data.page(), folder, accept_downloads=True, bypass_csp=False)
    return page, asked, said


@pytest.fixture
def page(opened):
    page, asked, said = opened
    page.goto(page.url.partition("#")[0])
    yield page
    assert not asked and not said


def column(page, table: str, number: int) -> list[str]:
    return page.locator(f"{table} tbody tr:visible > :nth-child({number})").all_inner_texts()


FLOODS = "#table-2 table"


def test_the_verdict_comes_first_and_every_finding_can_be_reached(page):
    first = page.locator("header").inner_text()
    assert "1 severe finding, 2 warnings and 1 note." in first
    assert "8978b337a8029ede" in first and "12,000" in first and "1 unreadable" in first
    for link in page.locator(".contents li > a").all():
        target = link.get_attribute("href")
        assert target and page.locator(f'article[id="{target[1:]}"] h3').text_content() == link.text_content()
    assert "Remedy: give some" in page.locator("section:has(> #unseen)").inner_text()
    article = page.locator(f"#{BACKDOORS}").text_content()  # what is out of sight is not laid out yet
    assert "30 pairs: 0.25% 0.18%–0.36% (95%) of 12,000" in article


def test_a_table_is_sorted_by_click_and_by_keyboard(page):
    page.locator("#table-2 > summary").click()
    head = page.locator(f"{FLOODS} thead th")
    assert column(page, FLOODS, 2)[0] == "100"
    head.nth(1).get_by_role("button").click()
    assert head.nth(1).get_attribute("aria-sort") == "descending"
    head.nth(1).get_by_role("button").press("Enter")
    assert head.nth(1).get_attribute("aria-sort") == "ascending"
    assert column(page, FLOODS, 2)[:3] == ["56", "57", "58"]
    head.nth(3).get_by_role("button").focus()
    page.keyboard.press("Space")
    assert head.nth(1).get_attribute("aria-sort") is None
    assert column(page, FLOODS, 4)[:3] == ["x0", "x1", "x2"]  # as people count, the third has none
    page.keyboard.press("Space")
    assert column(page, FLOODS, 4)[0] == "x44"
    page.locator("#table-2 .pager button").last.click()
    page.locator("#table-2 .pager button").last.click()
    assert column(page, FLOODS, 4)[-1] == "–", "what is not known comes last either way"


def test_pages_turn_and_show_everything_once(page):
    gallery = page.locator(f"#{BACKDOORS} .gallery")
    pager, seen = page.locator(f"#{BACKDOORS} .gallery + .pager"), []
    assert pager.get_by_role("button").first.is_disabled()
    while True:
        shown = gallery.locator(
            "> li:visible .caption"
        ).all_text_contents()  # innerText is empty where nothing was laid out yet
        assert len(shown) <= 12
        seen += shown
        if pager.get_by_role("button").last.is_disabled():
            break
        pager.get_by_role("button").last.press("Enter")
    assert pager.get_by_role("status").inner_text() == "25–30 of 30"
    assert [text.strip() for text in seen] == [f"caption {i}" for i in range(30)]


def test_why_a_pair_is_there(page):
    tile = page.locator(f"#{BACKDOORS} .tile").nth(1)
    tile.locator("summary").press("Enter")
    panel = tile.locator(".panel").inner_text()
    for text in (BACKDOORS, TAIL, "slof(k=16)", "a boat", "a ripe banana", "changed", data.uid(1), "640 × 480"):
        assert text in panel
    assert "above" not in panel
    expect(tile.locator(".alike img")).to_have_count(4)  # the first of its group has no picture and stays a name
    suspect = page.locator(f"#{TAIL} .tile").nth(11)
    suspect.locator("summary").click()
    assert "above the fence of 9.5" in suspect.inner_text()
    page.goto(f"{page.url.partition('#')[0]}#{BACKDOORS}-tile-30")
    assert page.locator(f"#{BACKDOORS} .tile").nth(29).is_visible(), "a link opens the page that its pair is on"


def downloaded(page, folder: Path) -> Path:
    with page.expect_download() as started:
        page.locator("#download").click()
    file = folder / started.value.suggested_filename
    started.value.save_as(file)
    return file


def test_what_is_selected_becomes_a_list_that_listed_takes(page, tmp_path, monkeypatch):
    page.locator(f".contents [data-pick={BACKDOORS}]").check()
    assert page.locator(f"article [data-pick={BACKDOORS}]").is_checked(), "both boxes are one"
    page.locator(f"article [data-pick={TAIL}]").press("Space")
    assert page.locator("#picked").inner_text() == "2 findings, 55 pairs on the list."
    file = downloaded(page, tmp_path)
    both = f"{BACKDOORS} {TAIL}"
    assert f"{data.uid(27)},{both}\n" in file.read_text()
    command = page.locator("#made code").inner_text()
    monkeypatch.chdir(tmp_path)
    score, scoring = arguments(command.split("&&")[0])
    detector = spec.parse("detectors", scoring["--detector"][0])
    who = np.asarray([data.uid(i) for i in range(60)], object)
    scores = detector.score(Batch(uid=who), None)
    assert scores.tolist() == [1.0] * 55 + [0.0] * 5
    filtered, filtering = arguments(command.split("&&")[1])
    assert [word[:3] for word in (score, filtered)] == [
        ["mithridate", verb, data.REMOVAL.where] for verb in ("score", "filter")
    ]
    assert filtering["--scores"] == [score[3]]
    policy = spec.parse("policies", filtering["--policy"][0])
    columns = {"uid": who, f"{Path(score[3]).name}:{spec.text(detector)}": scores}
    assert policy.drops(columns, policy.fit(lambda: [columns])).tolist() == [True] * 55 + [False] * 5


def arguments(command: str) -> tuple[list[str], dict[str, list[str]]]:
    """Of a command the words before its options, and what follows each of these."""
    words, options = [], {}
    for word in shlex.split(command.replace("\\\n", " ")):
        if word.startswith("--"):
            options[word] = []
        else:
            (next(reversed(options.values())) if options else words).append(word)
    return words, options


def test_a_list_too_long_for_the_page_is_read_from_its_file(page):
    assert "too many for this page" in page.locator(f"#{MANY}").text_content()
    for name in (MANY, BACKDOORS):
        page.locator(f".contents [data-pick={name}]").check()
    assert f"read from their files by the command: {MANY}." in page.locator("#apart").inner_text()
    command = page.locator("#made code").inner_text()
    (scored, scoring), (_, filtering) = map(arguments, command.split("&&"))
    detector = f"listed(file=('removal.csv', '/data/audited/findings/{MANY}.parquet'), keep=(0, 1))"
    assert scoring["--detector"] == [detector] and spec.parse("detectors", detector).keeps == (0, 1)
    assert filtering["--scores"] == [scored[3]]
    assert spec.parse("policies", filtering["--policy"][0]).detectors == ("removal:listed",)
    page.locator(f".contents [data-pick={BACKDOORS}]").uncheck()
    assert not page.locator("#download").is_visible()
    page.locator(f".contents [data-pick={MANY}]").uncheck()
    assert not page.locator("#selected").is_visible()


@given(st.lists(st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), max_size=3), min_size=1, max_size=3))
def test_of_every_group_of_every_list_one_stays(lists):
    called = [
        List([data.uid(i) for g in groups for i in g], [str(n) for n, g in enumerate(groups) for _ in g], 1)
        for groups in lists
    ]
    gone = unwanted(called)
    assert all({*map(data.uid, group)} - gone for groups in lists for group in groups)
    forced = List([data.uid(0)], [], 0)
    also = unwanted([*called, forced])
    assert data.uid(0) in also
    assert all({*map(data.uid, group)} - also for groups in lists for group in groups if group != {0})


def test_lists_that_overlap_leave_one_of_every_group_and_the_page_decides_as_the_detector_does(browser, tmp_path):
    """A flood {0, a} that leaves 0 and copies {a, b} that leave a would, one after the other, take a and b."""
    first, a, b = sorted(map(data.uid, range(3)))
    members = {"natural_backdoors-near_identical": [(first, a)], "duplicates-near": [(a, b)]}
    rng = np.random.default_rng(0)
    more = [[tuple(map(data.uid, rng.choice(40, 3, replace=False))) for _ in range(9)] for _ in members]
    parts, lists = data.parts(), {}
    for (name, groups), extra in zip(members.items(), more, strict=True):
        frame = [(uid, str(n)) for n, group in enumerate([*groups, *extra]) for uid in group]
        told = _removable(pl.DataFrame(frame, ["uid", "group"], orient="row"), 1, f"/{name}.parquet", 1_000)
        parts["members"][name] = replace(parts["members"][name], **told)
        lists[name] = List(*zip(*frame, strict=True), 1)
    lists[TAIL] = List([data.uid(i) for i in range(25, 55)], [], 0)
    page, *_ = open_page(browser, render_audit(**parts), tmp_path, accept_downloads=True, bypass_csp=False)
    for picked in (MANY, BACKDOORS, TAIL):
        page.locator(f".contents [data-pick={picked}]").check()
        chosen = {line.partition(",")[0] for line in downloaded(page, tmp_path).read_text().splitlines()[1:]}
        so_far = [lists[name] for name in (MANY, BACKDOORS, TAIL)[: (MANY, BACKDOORS, TAIL).index(picked) + 1]]
        assert chosen == set(unwanted(so_far))
        if picked == BACKDOORS:
            assert all({*group} - chosen for name in members for group in [*members[name], *more[0], *more[1]])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("uid\n1.2E+31\n", "did a spreadsheet write the file anew"),
        ("pair\nx\n", "no csv with a column uid"),
        (None, "no such file"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path, text, why):
    file = tmp_path / "removal.csv"
    if text:
        file.write_text(text)
    detector = spec.parse("detectors", f"listed(file={str(file)!r})")
    with pytest.raises(InputError, match=why):
        detector.score(Batch(uid=np.asarray([data.uid(0)], object)), None)


def test_a_command_is_copied_whole(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    command = page.locator(f"#{BACKDOORS} .act .command")
    command.get_by_role("button").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert shlex.split(copied.replace("\\\n", " ")) == shlex.split(
        data.REMOVAL.commands(BACKDOORS, f"/data/audited/findings/{BACKDOORS}.parquet", 1)
    )


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "escaping alone"])
def test_hostile_text_stays_text(browser, tmp_path, policy):
    page, asked, said = open_page(browser, data.page(HOSTILE), tmp_path, bypass_csp=not policy)
    for details in page.locator(".tile:visible summary").all()[:2]:
        details.click()
    expect(page.locator(f"#{BACKDOORS} .tile").nth(1).locator(".alike img")).to_have_count(4)
    page.locator("#table-2 > summary").click()
    page.locator(f"{FLOODS} thead button").first.click()
    page.locator(".contents [data-pick]").first.check()
    assert page.evaluate("window.ran") is None
    assert not asked and not said
    assert "%zz%20<script>window.ran = 1" in page.locator(".gallery .caption").first.text_content()
    assert page.evaluate("[...document.scripts].filter(s => s.type != 'application/json').length") == 1
    assert "\u202e" not in page.content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_policy_stops_what_escaping_lets_through(browser, tmp_path):
    html = data.page().replace("</main>", "<script>window.ran = 1</script><img src='https://evil.invalid/a'></main>")
    page, asked, said = open_page(browser, html, tmp_path)
    assert page.evaluate("window.ran") is None
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.querySelector('script').closest('body').innerHTML = '<b>x</b>'")
    assert len(said) >= 2 and all("Content Security Policy" in line or "Trusted" in line for line in said)
    assert not asked


def test_it_is_whole_without_its_script(browser, tmp_path):
    page, asked, said = open_page(browser, data.page(), tmp_path, java_script_enabled=False)
    assert page.locator(f"#{BACKDOORS} .tile:visible").count() == 30
    assert page.locator("thead button, .pager, .pick:visible, #removal:visible").count() == 0
    page.locator(f"#{BACKDOORS} .tile summary").nth(1).click()
    assert page.locator(f"#{BACKDOORS} .panel").nth(1).get_by_text("a ripe banana").first.is_visible()
    assert page.locator(f"#{BACKDOORS} .command code").inner_text().startswith("mithridate score")
    assert not asked and not said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_and_nothing_is_too_wide(browser, tmp_path, width, scheme):
    page, asked, _ = open_page(
        browser, data.page(), tmp_path, viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page.locator(f"#{BACKDOORS} .tile summary").nth(1).click()
    page.locator(f"#{BACKDOORS} .listing > summary").click()
    page.locator("#table-2 > summary").click()
    page.locator(".contents [data-pick]").first.check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert axe.violations(page) == []
    assert not asked


def test_paper_shows_what_can_be_read_and_no_buttons(page):
    page.emulate_media(media="print")
    assert page.locator(":is(.pager, .copy, .pick, .selected, .why):visible").count() == 0
    assert page.locator(f"#{BACKDOORS} .command").is_visible()
    assert len(page.pdf()) > 10_000
    page.emulate_media(media="screen")


def test_a_gallery_shows_all_pairs_that_were_chosen_for_it(tmp_path):
    """Groups of 1000, 2 and 2: sixteen of the first, and the others whole."""
    rows = [(data.uid(i), "0", group, "caption", "why") for i, group in enumerate("a" * 1000 + "bbcc")]
    members = pl.DataFrame(rows, ["uid", "shard", "group", "caption", "reason"], orient="row")
    found = {
        MANY: Found(
            kind="near",
            severity="warning",
            title="",
            n=1004,
            of=2000,
            explanation="",
            source="",
            members=members,
            keep=1,
        )
    }
    source = Source(str(tmp_path), Inputs("", "", "", "key"), (), False)
    write_report(data.parts()["audited"], found, [], About({}, {}, {}, [], {}, True), source, (), None)
    assert (tmp_path / "report.html").read_text().count('<li class="tile"') == 20


def test_same_audit_same_bytes():
    assert data.page() == data.page()

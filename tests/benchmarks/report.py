"""How large an audit's report of a million pairs is, and how soon a browser has it open.

`python -m tests.benchmarks.report [--pairs 1000000] [--findings 24] [--json FILE]` makes the report of a dataset with
photographs (noise with structure, which compresses worse than most), a third of whose pairs are in the largest
finding, half as many in the next, and so on; every page bound is reached. It is opened in headless Chromium with a cold
cache, at the width of a desk and of a phone (and there with a CPU slowed down four times), until `load` and the first
paint; then the largest list is selected and its download made.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
from PIL import Image

from pipeline import audit_report
from pipeline.audit_columns import Source
from pipeline.audit_lists import Removal
from pipeline.audits._audit import LISTED, About, Found
from pipeline.audits._schema import Audited, Dataset, Finding, Histogram, Table, share_of, verdict
from pipeline.inputs import Inputs
from pipeline.report import thumbnail
from pipeline.report.audit import Known

CAPTION = (
    "a long caption of some thirty words that says what is on the photograph and where it was bought, as shops do, "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--findings", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        audited, found = made(folder, options.pairs, options.findings)
        source = Source(folder, Inputs("", "", "", "key"), (), False)
        about = About({"0.tar": options.pairs}, {"0.tar": ""}, {}, [], {}, True)
        clock = time.perf_counter()
        with mock.patch.object(audit_report, "_known", lambda *args: known(args[-1])):  # pictures of no shard
            audit_report.write_report(audited, found, [], about, source, (), None)
        seconds = time.perf_counter() - clock
        report = Path(folder, "report.html")
        result = {
            "pairs": options.pairs,
            "findings": options.findings,
            "pairs_in_findings": sum(one.n for one in found.values()),
            "pictures": report.read_bytes().count(b"data:image/webp"),
            "mb": round(report.stat().st_size / 1e6, 1),
            "seconds_to_write": round(seconds, 1),
            "load_before": round(load, 1),  # of other work on the machine; on two cores it should be near 0
            "opened": opened(report),
        }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def made(folder: str, pairs: int, findings: int) -> tuple[Audited, dict[str, Found]]:
    """The audit and what it found, by name."""
    found, told = {}, []
    uids = pl.Series([hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(pairs // 3)])
    for number in range(findings):
        n = max(100, pairs // 3 // 2**number)
        group = np.arange(n) // 25
        members = pl.DataFrame(
            {
                "uid": uids[:n],
                "shard": pl.Series([f"{i % 100:05d}" for i in range(n)]),
                "group": pl.Series(group).cast(pl.String),
                "caption": pl.Series([f"{CAPTION}{i}" for i in range(n)]),
                "reason": pl.Series(["one of 25 images that look alike (perceptual hash)"] * n),
            }
        )
        kind, title = f"kind{number}", f"{n:,} pairs in {n // 25:,} groups look like another"
        found[f"scores-{kind}"] = Found(
            kind=kind,
            severity="warning",
            title=title,
            n=n,
            of=pairs,
            explanation="What it may mean. " * 8,
            source="Somebody",
            members=members,
        )
        name = f"scores-{kind}"
        action = Removal("/data/crawl", folder).commands(name, f"{folder}/findings/{name}.parquet", 0)
        share, file = share_of(n, pairs), f"findings/{name}.parquet"
        told.append(Finding("scores", kind, "warning", title, n, share, "It may mean. " * 8, "X", action, file, ()))
    rows = tuple((f"{CAPTION}{i}", i, i / 7, f"word{i}") for i in range(LISTED))
    tables = tuple(
        Table("captions", f"t{i}", f"Table {i}", ("caption", "pairs", "share", "which"), rows, pairs) for i in range(20)
    )
    counts, edges = tuple(range(40)), tuple(np.linspace(0, 1, 41).tolist())
    drawn = tuple(
        Histogram("scores", f"s{i}", f"Score {i}", edges, counts, sum(counts), 0.8, f"kind{i}") for i in range(findings)
    )
    whole = Dataset("/data/crawl", "shards", 100, 0, pairs, "0" * 16)
    return Audited(whole, verdict(tuple(told), ()), tuple(told), tables, drawn, (), ("scores", "captions")), found


def known(places: set[tuple[str, str]]) -> dict[tuple[str, str], Known]:
    scores = {f"scores:detector{i}(k=16)": 0.123 * i for i in range(8)}
    facts = {
        "size": "640 × 480",
        "url": "https://cdn.example.org/a/long/path/of/an/image.jpg",
        "image sha256": "0" * 64,
    }
    return {place: Known(photo(i % 64), facts, scores) for i, place in enumerate(sorted(places))}


@cache
def photo(number: int) -> tuple[bytes, bool] | None:
    """A thumbnail of noise at three scales: 4 to 6 kB, as of photographs."""
    rng = np.random.default_rng(number)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize((480, 480)), float)
        for n in (4, 16, 120)
    ]
    mixed = np.average(layers, axis=0, weights=(4, 2, 1)).clip(0, 255).astype(np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.fromarray(mixed).save(file.name, quality=90)
        return thumbnail(Path(file.name).read_bytes())


def opened(report: Path) -> dict[str, dict[str, float]]:
    """Seconds in a browser, by how it looks."""
    import shutil

    from playwright.sync_api import sync_playwright

    out = {}
    with sync_playwright() as play:
        own = play.chromium.executable_path
        path = own if Path(own).exists() else shutil.which("chromium")
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name, width, slower in (("desk", 1280, 1), ("phone", 360, 1), ("slow phone", 360, 4)):
            page = browser.new_page(viewport={"width": width, "height": 800}, accept_downloads=True)
            if slower > 1:
                page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
            page.goto(report.as_uri())
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            timing = page.evaluate(
                "[performance.getEntriesByType('navigation')[0].loadEventEnd,"
                " performance.getEntriesByName('first-contentful-paint')[0].startTime]"
            )
            out[name] = {"load_s": round(timing[0] / 1000, 2), "first_paint_s": round(timing[1] / 1000, 2)}
            if name == "desk":
                clock = time.perf_counter()
                page.locator(".contents [data-pick]").nth(2).check()
                with page.expect_download() as started:
                    page.locator("#download").click()
                rows = Path(started.value.path()).read_text().count("\n") - 1
                out["list"] = {"rows": rows, "seconds": round(time.perf_counter() - clock, 2)}
            page.close()
        browser.close()
    return out


if __name__ == "__main__":
    main()

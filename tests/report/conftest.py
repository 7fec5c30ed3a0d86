"""A real browser: the report's promises (nothing leaves the page, no script runs) are a browser's to confirm."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> Iterator["playwright.sync_api.Browser"]:  # noqa: F821
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        own = play.chromium.executable_path
        found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        path = next(found, own if Path(own).exists() else None)
        if path is None:
            pytest.fail("these tests open the report in a browser: `apt-get install chromium` is needed")
        chromium = play.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()

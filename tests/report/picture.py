"""The picture of docs/read_the_report.md: how an audit's report begins, and beside it its worst finding.

mithridate poison pipeline/demo/data/train /data/crawl --attack "patch(target='banana', size=48)" --dose 0.5%
mithridate audit /data/crawl /data/audited
python tests/report/picture.py /data/audited/report.html docs/images/report.webp
"""

import io
import shutil
import sys
from pathlib import Path

from conftest import QUIET
from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1080, 1110  # of each half, in pixels of the page


def main(report: str, picture: str) -> None:
    with sync_playwright() as play:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        page = play.chromium.launch(executable_path=path, args=QUIET).new_page(
            viewport={"width": WIDTH, "height": HEIGHT}
        )
        page.goto(Path(report).absolute().as_uri())
        halves = [page.screenshot()]
        page.locator("article").first.evaluate("one => one.scrollIntoView()")
        halves.append(page.screenshot())
    whole = Image.new("RGB", (2 * WIDTH, HEIGHT))
    for place, half in enumerate(halves):
        whole.paste(Image.open(io.BytesIO(half)).convert("RGB"), (place * WIDTH, 0))
    whole.save(picture, quality=80, method=6)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A dataset that is not ours: every picture with an alternative text in GIMP's manual, as a crawler would find it.

    python -m tests.benchmarks.manual SHARDS        # then: mithridate audit SHARDS OUT

The pages are Debian's packages `gimp-help-en`, `-de` and `-fr` (GFDL), fetched at run time and unpacked, not installed;
nothing of them is kept here. As in LAION, a pair is an `<img>` and its `alt`, as often as it stands on a page: nothing
is cleaned, so buttons and icons that are on every page are in it.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "de", "fr")
PAIRS_A_SHARD = 2_000


class _Pictures(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "img" and told.get("src") and told.get("alt"):
            self.found.append((str(told["src"]), str(told["alt"])))


def unpacked(folder: Path) -> list[Path]:
    """The manual of each language."""
    for language in LANGUAGES:
        subprocess.run(["apt-get", "download", "-qq", f"gimp-help-{language}"], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    return [folder / "usr/share/gimp/2.0/help" / language for language in LANGUAGES]


def pairs(manual: Path) -> Iterator[tuple[Path, str, str]]:
    """(picture, alternative text, page) in the order of the pages."""
    for page in sorted(manual.glob("*.html")):
        parser = _Pictures()
        parser.feed(page.read_text(errors="replace"))
        for source, text in parser.found:
            if (picture := manual / source).is_file():
                yield picture, text, f"{manual.name}/{page.name}"


def write(found: list[tuple[Path, str, str]], out: Path) -> None:
    """WebDataset shards as img2dataset leaves them."""
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(found), PAIRS_A_SHARD):
        number = start // PAIRS_A_SHARD
        with tarfile.open(out / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, (picture, caption, page) in enumerate(found[start : start + PAIRS_A_SHARD]):
                image, key = picture.read_bytes(), f"{number:05d}{place:04d}"
                told: dict[str, Any] = {"caption": caption, "key": key, "page": page, "status": "success"}
                told["sha256"] = hashlib.sha256(image).hexdigest()
                members = {
                    picture.suffix[1:].lower(): image,
                    "txt": caption.encode(),
                    "json": json.dumps(told).encode(),
                }
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = [pair for manual in unpacked(Path(folder)) for pair in pairs(manual)]
        write(found, Path(sys.argv[1]))
    print(f"{len(found):,} pairs in {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

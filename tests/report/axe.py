"""axe-core, which judges the accessibility of a page: from npm, since its licence (MPL-2.0) is not this project's.

Kept in a cache folder of the user; without npm or a registry the tests that need it are skipped, and say so.
"""

import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "4.14.1"
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


def script() -> str:
    """The source of axe.min.js, of one version and digest."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mithridate-tests"
    file = folder / f"axe-core-{VERSION}.min.js"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")  # another test process may fetch it at the same time
        own.write_bytes(_fetched())
        own.replace(file)
    text = file.read_bytes()
    assert hashlib.sha256(text).hexdigest() == SHA256, f"{file} is not axe-core {VERSION}; remove it"
    return text.decode()


def _fetched() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"axe-core@{VERSION}", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"axe-core cannot be had from npm here ({type(error).__name__}): accessibility is not checked")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            found = archive.extractfile("package/axe.min.js")
            assert found
            return found.read()


def violations(page) -> list[str]:
    """What axe finds wrong with the page as it is now, a line each with the elements."""
    page.evaluate(script())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    return [f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes'][:5]]}" for one in found]

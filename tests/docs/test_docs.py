"""The documents: no dead link, no command that is not there, and the pages that say so are run, line by line."""

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import VERBS

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {page for page in PAGES if any(kind == "sh" for kind, _ in FENCE.findall(page.read_text()))}


def commands(page: Path) -> list[list[str]]:
    """The words of every `mithridate …` of a page, in blocks and in running text."""
    text = page.read_text()
    blocks = [body for _, body in FENCE.findall(text)]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(mithridate [^`]+)`", FENCE.sub("", text).replace("\n", " "))
    found = [re.search(r"(?:\.venv/bin/)?\bmithridate (?!\w+ is\b)([^#|]*)", line) for line in lines]
    return [shlex.split(match[1].split("&&")[0], posix=False) for match in found if match and match.start() < 4]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_there_with_its_flags(page: Path) -> None:
    for words in commands(page):
        if not words or not re.fullmatch(r"[a-z][a-z-]+", words[0]):
            continue  # VERB, …
        assert words[0] in VERBS, words
        module, name = VERBS[words[0]][0].split(":")
        known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        flags = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--") and len(word) > 2}
        assert flags <= known.keys() | {"help"}, words


def test_the_commands_are_found() -> None:
    assert len([words for page in PAGES for words in commands(page)]) > 60


def test_the_site_has_no_dead_link_and_asks_nobody(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    pages = list((tmp_path / "out" / "site").rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?(https?:)?//", page.read_text())
        assert not loaded, page


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted(RUN), ids=lambda page: page.name)
def test_the_page_runs_as_it_is_written(page: Path, tmp_path: Path) -> None:
    """In a copy of the sources, since a page may add a file to them."""
    source = tmp_path / "source"
    for room in ("pipeline", "filters", "train"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mithridate"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline.cli "$@"\n')
    program.chmod(0o755)
    (here := tmp_path / "here").mkdir()
    script = "".join(body for kind, body in FENCE.findall(page.read_text()) if kind == "sh")
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(source),
        "MITHRIDATE": str(source),
        "RAY_ADDRESS": "local",
    }
    said = subprocess.run(
        ["bash", "-euxc", script],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert said.returncode == 0, said.stdout[-4000:]

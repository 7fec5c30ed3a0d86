"""The command line as a person meets it: quick help, one-line errors, exit codes that carry the verdict."""

import subprocess
import sys

import pytest

from pipeline.cli import VERBS
from pipeline.spec import KINDS


def run(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_there_and_loads_nothing_heavy(verb):
    code = (
        "import sys; from pipeline.cli import run\n"
        f"try: run({verb!r}, ['--help'])\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "heavy = {'torch', 'ray', 'polars', 'faiss', 'open_clip', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"mithridate {verb}" in done.stdout


@pytest.mark.parametrize("kind", [*KINDS, "recipes"])
def test_list_shows_every_entry(kind):
    from pipeline.spec import names

    done = run("list", kind)
    assert done.returncode == 0
    if kind == "recipes":
        assert "debug" in done.stdout
        assert "demo" in done.stdout
    for name in names(kind) if kind in KINDS else ():
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("poisn",), "no verb 'poisn'"),
        (
            ("poison", "nowhere", "out", "--attack", "patch(target='a')", "--dose", "3"),
            "nowhere: no such file or folder",
        ),
        (("poison", ".", "out", "--attack", "patch(target='a')", "--dose", "3"), "no shards here"),
        (("poison", ".", "out", "--attack", "pach(target='a')", "--dose", "3"), "did you mean 'patch'"),
        (("score", ".", "out", "--detector", "slof(q=3)"), "no shards here"),
        (("train", "nowhere", "out"), "nowhere: no such file or folder"),
        (("loop", "nowhere.toml", "out"), "nowhere.toml: No such file"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, says, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_unknown_config_keys_are_named(tmp_path):
    (tmp_path / "c.toml").write_text('shards = "a"\nevalution = "b"\n')
    done = run("loop", "c.toml", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown keys evalution; there are: shards, evaluation" in done.stderr

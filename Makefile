# `make setup` makes .venv from the lock; demo and test need nothing before them but Python >= 3.11 and a C library.
PYTHON ?= python3
PY := .venv/bin/python
OUT ?= out/demo

.PHONY: setup demo debug test test-slow lint lock docs clean

setup: .venv/.done

.venv/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed (PYTHON=… names one)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "python3 -m venv does not work: on Debian, apt-get install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(PY) -m uv pip sync --quiet --python $(PY) requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	.venv/bin/mithridate demo $(OUT)

debug: setup
	.venv/bin/mithridate demo out/debug --size debug

test: setup browser
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup browser
	$(PY) -m pytest -m slow

# The report is opened in a real browser by its tests.
.PHONY: browser
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || \
	  { apt-get install -y -qq chromium >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1; } || \
	  echo "no chromium and no way to install it: the report's browser tests will fail"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Names and versions only: no registry host enters the lock.
lock:
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --group dev --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

# A site that asks the network for nothing, in out/site; a dead link is an error.
docs: setup
	$(PY) -m mkdocs build --quiet && echo out/site/index.html

clean:
	rm -rf .venv out

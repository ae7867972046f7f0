# Every target sets up what it needs: a virtual environment with the pinned dependencies of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all lint clean

$(READY): pyproject.toml constraints.txt samples/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "altsight needs Python 3.11 or newer: set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./samples -e '.[dev]'
	touch $@

setup: $(READY)

demo: setup
	$(BIN)/altsight demo

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

test-all: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

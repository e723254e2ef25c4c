PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

.PHONY: demo test test-full lint install clean docker-lock docker-check
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# The stamp makes a second `make` instant; pip sees to it that the versions fit.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: install
	$(BIN)/featstore demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/tree.py .check
	cd .check && ../$(BIN)/mypy -p featstore --config-file ../pyproject.toml --cache-dir ../.mypy_cache
	cd .check && ../$(BIN)/lint-imports --config ../pyproject.toml --no-cache

test: lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not full"

test-full: lint
	$(BIN)/python -m pytest -n $(JOBS) -v --durations=15 | tee docs/benchmarks/test-full.log

# Renews the packages that the images pin.
docker-lock: install
	$(BIN)/python -m pip install --quiet "uv>=0.9"
	$(BIN)/python docker/lock.py

# Builds both images without an engine, and tries them; as root, on Debian. Minutes and 25 GB of disk.
docker-check: install
	PYTHON=$(BIN)/python docker/check.sh

clean:
	rm -rf .check build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

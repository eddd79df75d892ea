# Everything a fresh machine needs is Python 3.11+ and make:
#
#   make demo     real conversations -> verified shards -> a tiny Thinker learns from them   (about 5 minutes)
#   make test     lint, types and all tests                                                  (about 15 minutes)
#
# The first target that needs it makes .venv and installs the package with its extras (about 2 minutes, 6 GB);
# it is done again only when pyproject.toml changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV    := .venv
PY      := $(VENV)/bin/python
BUILD   := build
SAMPLES := $(BUILD)/samples
PYTEST_JOBS ?= 2

# Pip is asked once per content of pyproject.toml, not once per time stamp: a fresh clone has new time stamps.
STAMP := $(VENV)/.installed-$(shell cksum < pyproject.toml | tr ' ' '-')

# Found when it is needed, so that `make help` works without Python.
find_python = $(shell for name in $(PYTHON) python3.12 python3.11 python3.13 python3 python; do \
	"$$name" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$name" && break; done)

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv samples demo test lint types tests bench fuzz capacity docs clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install OmniPrep with the extras torch and dev

$(STAMP): pyproject.toml
	@python="$(find_python)"; \
	if [ -z "$$python" ]; then \
		echo "make: no Python 3.11 or later on PATH; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "make: installing into $(VENV) with $$($$python --version); about 2 minutes, most of it PyTorch"; \
	[ -x $(PY) ] || "$$python" -m venv $(VENV) || { \
		echo "make: $$python cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }; \
	$(PY) -m pip install -qq --progress-bar off -e '.[torch,dev]' || { \
		echo "make: pip could not install the packages (its own message is above); if that is the network, run the same command again: what was downloaded is kept" >&2; exit 1; }; \
	rm -f $(VENV)/.installed-*; touch $@

samples: $(STAMP) ## fetch sample media into build/samples (pinned versions, checksums)
	@$(PY) scripts/fetch_samples.py $(SAMPLES)

demo: $(STAMP) samples ## real conversations -> shards -> verify -> a tiny Thinker learns from them
	@$(PY) scripts/demo.py

lint: $(STAMP) ## ruff: rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(STAMP) ## mypy --strict
	@$(VENV)/bin/mypy --strict omniprep

# Tests that start Ray carry one xdist group: they share a machine badly with each other.
tests: $(STAMP) samples
	@OMNIPREP_SAMPLES=$(abspath $(SAMPLES)) $(VENV)/bin/pytest -q -n $(PYTEST_JOBS) --dist loadgroup

test: lint types tests ## lint, types and all tests

bench: $(STAMP) samples ## every speed ratio that the docs claim, measured now
	@OMNIPREP_SAMPLES=$(abspath $(SAMPLES)) $(PY) tests/benchmarks/run.py

SECONDS ?= 60
fuzz: $(STAMP) ## coverage-guided fuzzing of the parsers, four targets one after another (SECONDS=60 each)
	@$(PY) -m tests.fuzz.atheris_run $(SECONDS)

capacity: $(STAMP) samples ## a million text and 20,000 audio records: time and memory (an hour, 15 GB; CAPACITY="--text 20000 --audio 500" for a trial)
	@OMNIPREP_SAMPLES=$(abspath $(SAMPLES)) $(PY) tests/benchmarks/capacity.py $(CAPACITY)

docs: $(STAMP) ## build the site into site/
	@$(PY) -m pip install -qq --progress-bar off -e '.[docs]'
	@$(VENV)/bin/mkdocs build --strict

clean: ## remove build outputs and caches, keep .venv
	rm -rf $(BUILD) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)

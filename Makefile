# Needs only make and Python 3.10 or newer with its venv module. Everything else goes into $(VENV).
#   make test PYTHON=python3.12 VENV=/tmp/v   another interpreter, another place
#   make test ARGS="-k qdq -x"                arguments for the tool that runs

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One stamp per set of extras: installed again when the metadata changes.
TEST_READY  := $(VENV)/.ready-test
DEV_READY   := $(VENV)/.ready-dev
ZOO_READY   := $(VENV)/.ready-zoo
METADATA    := setup.cfg pyproject.toml

.PHONY: help demo test test-all lint format bench clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

demo: $(TEST_READY) ## quantize a small trained network and measure it (result in demo-out/)
	@$(BIN)/python tools/demo.py $(ARGS)

test: $(ZOO_READY) ## the test suite, a few minutes; real models are fetched once, without a network they skip
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(ZOO_READY) ## every test, slow ones too
	@$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(DEV_READY) ## ruff and mypy, changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_READY) ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(ZOO_READY) ## the benchmarks of docs/benchmarks.md
	@$(BIN)/python -m tools.bench $(ARGS)

clean: ## remove the virtual environment, caches and results
	@if [ -f '$(VENV)/pyvenv.cfg' ]; then rm -rf '$(VENV)'; fi
	@rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'pass' 2>/dev/null || \
	    { echo "error: '$(PYTHON)' does not run. Name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $$($(PYTHON) --version 2>&1) is too old, 3.10 or newer is needed. Name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: $(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -m venv $(VENV)

$(TEST_READY): $(METADATA) | $(BIN)/python
	@echo "installing the package with its cpu and test extras" >&2
	@$(PIP) install -e '.[cpu,test]'
	@touch $@

$(DEV_READY): $(METADATA) | $(BIN)/python
	@echo "installing the package with its cpu, test and dev extras" >&2
	@$(PIP) install -e '.[cpu,test,dev]'
	@touch $@

$(ZOO_READY): $(METADATA) | $(BIN)/python
	@echo "installing the package with its cpu, test and zoo extras" >&2
	@$(PIP) install -e '.[cpu,test,zoo]'
	@touch $@

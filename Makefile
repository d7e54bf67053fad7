# The first commands: `make train` and `make chat`. `make help` lists the others.

PYTHON ?= python3
# Number of ranks: one for each GPU, or two on the CPU.
NPROC ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# More options for train.py, or for pytest.
ARGS ?=

BIN := .venv/bin
# One stamp for each Python version, so another PYTHON gets a new environment.
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
RUNTIME := .venv/.runtime-$(VERSION)
DEVELOPMENT := .venv/.development-$(VERSION)
PYTEST = PYTHONPATH=. $(BIN)/python -m pytest
# Two test files at a time: a test of one process, or a rank that waits, leaves a core to the other (ARGS="-n 0" for one).
# If a test ends its process, the run ends: pytest-xdist 3.8 may wait for ever if it replaces the process (its issue 1378).
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Hide GPUs, so the result of the tests does not depend on the machine.
ON_CPU = CUDA_VISIBLE_DEVICES=

SEED ?=
MINUTES ?= 30

.PHONY: help train chat doctor test test-all test-gpu soak proof families curves bench compare museum quiz drawings lint format clean
.DEFAULT_GOAL := help

help: ## list every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(RUNTIME) ## train the demo into output/, replacing an earlier run (NPROC=processes ARGS="options of train.py")
	@set -e; processes=$(NPROC); export OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + processes - 1) / processes )); \
	set -x; $(BIN)/torchrun --nproc_per_node=$$processes train.py --overwrite_output_dir $(ARGS)

# Directory of the model to talk to.
MODEL ?= output
chat: $(RUNTIME) ## talk to a finished model in the terminal (MODEL=directory ARGS="options of model.chat")
	@$(BIN)/python -m model.chat $(MODEL) $(ARGS)

doctor: $(RUNTIME) ## print what a bug report needs: versions, GPUs, memory, limits, disks (ARGS="options of train.py")
	@$(BIN)/python -m runtime.doctor $(ARGS)

test: $(DEVELOPMENT) ## run the quick tests on the CPU, in about thirteen minutes on two cores (ARGS="options of pytest")
	$(ON_CPU) $(PYTEST) -m "not gpu and not slow" $(IN_PARALLEL) $(ARGS)

test-all: $(DEVELOPMENT) ## run these tests and the slow ones, which take minutes
	$(ON_CPU) $(PYTEST) -m "not gpu" $(IN_PARALLEL) $(ARGS)

test-gpu: $(DEVELOPMENT) ## run the tests that need a GPU
	$(PYTEST) -m gpu $(ARGS)

soak: $(DEVELOPMENT) ## break random runs by random faults, and compare them with unbroken ones (MINUTES=30, SEED=n replays a round)
	$(ON_CPU) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

proof: $(DEVELOPMENT) ## measure every topology against one process and write docs/proof.md
	$(ON_CPU) PYTHONPATH=. $(BIN)/python -m tests.proof

families: $(DEVELOPMENT) ## train every family of models in every way and write docs/models.md (ARGS="llama opt": some, no page)
	$(ON_CPU) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.table $(ARGS)

curves: $(DEVELOPMENT) ## train the demo on 1, 2 and 4 ranks and draw docs/curves.svg
	PYTHONPATH=. $(BIN)/python -m compare.curves

# Model and micro-batch of each measurement: those of the first table of docs/performance.md, or without a GPU the demo's.
# 30B-A3B-3-layers:4 is a mixture of experts.
ROWS ?= $(if $(shell command -v nvidia-smi),0.6B:4 0.6B:8 1.7B:4,0.6B:4)
bench: $(DEVELOPMENT) ## measure this trainer and others on the same model and blocks (ARGS="options of compare.bench", ROWS=0.6B:4)
	@set -e; for row in $(ROWS); do (set -x; PYTHONPATH=. $(BIN)/python -m compare.bench --model $${row%:*} --batch $${row#*:} $(ARGS)); done

compare: $(DEVELOPMENT) ## check that the trainers that are installed do the same work, and measure them (ARGS="options of train.py", ROWS=0.6B:4)
	@set -e; for row in $(ROWS); do (set -x; \
	PYTHONPATH=. $(BIN)/python -m compare.peers.same --model $${row%:*} --per_device_train_batch_size $${row#*:} $(ARGS); \
	PYTHONPATH=. $(BIN)/python -m compare.bench --model $${row%:*} --batch $${row#*:} $(ARGS)); done

museum: $(DEVELOPMENT) ## run the trainer with planted bugs and write docs/museum.md
	$(ON_CPU) PYTHONPATH=. $(BIN)/python -m tests.museum

quiz: $(DEVELOPMENT) ## plant a bug of the museum in quiz/tree and show its effect (CHAPTER=1 to 8, SEED=n); HINT=1 to 3; ANSWER=1
	@$(ON_CPU) PYTHONPATH=. $(BIN)/python -m tests.museum.quiz $(if $(CHAPTER),--chapter "$(CHAPTER)") \
	$(if $(SEED),--seed "$(SEED)") $(if $(HINT),--hint "$(HINT)") $(if $(ANSWER),--answer "$(ANSWER)")

drawings: $(DEVELOPMENT) ## draw docs/book/drawings/ (ARGS=record traces the steps of the timelines again)
	$(ON_CPU) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.drawings $(ARGS)

lint: $(DEVELOPMENT) ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: $(DEVELOPMENT) ## fix lint and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, output/ and quiz/; prepared data stays in its cache
	rm -rf .venv output quiz .mypy_cache .pytest_cache .ruff_cache

# A stamp is written last, so an interrupted installation starts again.
$(RUNTIME): requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'PYTHON=$(PYTHON): needs Python 3.11 or newer')"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

# Each target is a line that you could type yourself. They need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-all clients inputs faults lint format docs bench clean

# `make demo seed=1 run_dir=runs/one`: what the command line sets becomes overrides of the recipe.
OVERRIDES = $(filter-out PYTHON=% VENV=% CONSTRAINTS=%,$(MAKEOVERRIDES))
demo: $(VENV)/installed
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml -m lrd.train recipes/digits_resnet34_sgd_lrd.yaml run_dir=runs/demo $(OVERRIDES)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The inner loop: no launchers, no training, no compilers. Took 123 s on two cores that were busy.
FAST_TESTS := tests/recipe tests/data tests/tracking tests/distributed/test_communication.py \
	tests/distributed/test_network.py tests/distributed/test_replica_check.py \
	tests/checkpoint/test_store.py tests/checkpoint/test_async_writer.py \
	tests/parts/test_models.py tests/parts/test_schedules.py tests/parts/test_optimizers.py \
	tests/optim/test_mask.py tests/optim/test_dropout.py tests/optim/test_magma.py \
	tests/optim/test_classes.py tests/optim/test_references.py tests/docs

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(FAST_TESTS)

test-all: $(VENV)/installed
	$(BIN)/python -m pytest

# LRDropout in Lightning, Hugging Face's Trainer, timm and others, see docs/clients.md. It adds these packages to the environment.
clients: $(VENV)/clients
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/clients tests/docs

inputs: $(VENV)/installed
	$(BIN)/python -m tests.inputs

faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

bench: $(VENV)/installed
	$(BIN)/python benchmarks/masked_step.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache docs/_build

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lrd needs Python 3.11 or newer; say which: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev,docs]"
	touch $@

$(VENV)/clients: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev,docs,clients]"
	touch $@

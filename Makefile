# The same commands for people and for CI. `make help` lists them.
PORT ?= 8000
# Processes that run the tests. Most tests keep one core busy.
JOBS ?= 2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := cupaged engine tests benchmarks

# The extra for the NVIDIA driver: cuda13, cuda12, or nothing without one.
CUDA := $(shell $(PYTHON) -m cupaged.device)
CONSTRAINTS := .ci/constraints.txt
# A driver for CUDA 12 needs the builds of torch for it, which are on an index of their own (TORCH_INDEX), and
# CUDA 12's compiler and headers instead of the tested ones.
ifeq ($(CUDA),cuda12)
ifndef TORCH_INDEX
NO_INDEX := @echo "The driver is for CUDA 12, the usual build of torch for CUDA 13. Name the index of PyTorch's" \
  "builds for CUDA 12 (https://pytorch.org/get-started/locally): make TORCH_INDEX=URL ..." >&2; exit 1
endif
TEST_EXTRAS := cuda12,test-tools,lint
CONSTRAINTS := $(VENV)/constraints.txt
else
TEST_EXTRAS := test,lint
endif
SERVING := $(VENV)/.serve$(CUDA)
TESTING := $(VENV)/.test$(CUDA)
TESTING_ALL := $(VENV)/.test-all$(CUDA)
INSTALL := $(BIN)/python -m pip install

RUNS ?= 5

.PHONY: help venv serve test test-matrix test-all test-fresh lint format clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/constraints.txt: .ci/constraints.txt | $(BIN)/python
	grep -vE '^(cuda-toolkit|nvidia-cuda)' $< > $@

# torch first and by its exact pin; everything else is satisfied by it. It can be gigabytes: pip says what it
# downloads, without a bar for each of a dozen wheels.
$(SERVING): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(NO_INDEX)
	$(INSTALL) --progress-bar off $(addprefix --extra-index-url ,$(TORCH_INDEX)) "torch==$$(sed -n 's/^torch==//p' .ci/constraints.txt)"
	$(INSTALL) -q -c $(CONSTRAINTS) -e ".$(addsuffix ],$(addprefix [,$(CUDA)))"
	@touch $@

$(TESTING): $(SERVING)
	$(INSTALL) -q -c $(CONSTRAINTS) -e ".[$(TEST_EXTRAS)]"
	@touch $@

# Ray, which nothing but the tests of replicas needs.
$(TESTING_ALL): $(TESTING)
	$(INSTALL) -q -c $(CONSTRAINTS) -e ".[ray]"
	@touch $@

venv: $(TESTING)  ## a virtual environment with everything the tests and the linters need

serve: $(SERVING)  ## chat server with the demo model on port $(PORT)
	$(BIN)/python -m cupaged.serve --port $(PORT)

PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(TESTING)  ## the tests, some minutes; the same for everyone
	$(PYTEST)

test-matrix: $(TESTING_ALL)  ## the rest: every kernel for every architecture, every model class
	$(PYTEST) -m matrix

test-all: $(TESTING_ALL)  ## the tests and the rest of the matrix
	$(PYTEST) -m ""

test-fresh: $(TESTING)  ## what draws, $(RUNS) times with new seeds: RUNS=20, TESTS="tests/unit -k pool"
	$(PYTEST) --fresh $(RUNS) $(TESTS)

lint: $(TESTING)  ## ruff, mypy, clang-format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	@git ls-files "*.cu" "*.cuh" "*.cpp" "*.h" | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(TESTING)  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	@git ls-files "*.cu" "*.cuh" "*.cpp" "*.h" | xargs -r $(BIN)/clang-format -i

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info

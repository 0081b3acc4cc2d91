# The same commands for people and for CI. `make help` lists them.
PORT ?= 8000
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CUDA version of the driver ("13", "12"), empty without an NVIDIA driver.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
SERVE_EXTRA := $(if $(filter 12,$(CUDA)),[cuda12],$(if $(CUDA),[cuda13],))
SOURCES := cupaged engine tests benchmarks

.PHONY: help venv serve test lint format clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact pin; everything else is satisfied by it.
$(VENV)/.serve: pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q "torch==$$(sed -n 's/^torch==//p' .ci/constraints.txt)"
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e ".$(SERVE_EXTRA)"
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e ".[test,lint]"
	@touch $@

venv: $(VENV)/.test  ## a virtual environment with everything the tests and the linters need

serve: $(VENV)/.serve  ## chat server with the demo model on port $(PORT)
	$(BIN)/python -m cupaged.serve --port $(PORT)

test: $(VENV)/.test  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.test  ## ruff, mypy, clang-format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	@git ls-files "*.cu" "*.cuh" "*.cpp" "*.h" | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.test  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	@git ls-files "*.cu" "*.cuh" "*.cpp" "*.h" | xargs -r $(BIN)/clang-format -i

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info

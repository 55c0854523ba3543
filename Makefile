# One set of commands for people and for CI. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers: the suite is bound by small torch and compiler calls, and each worker holds about 1 GB.
WORKERS ?= 2

.PHONY: help demo test test-full lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       quantize a small real model, compare, generate"
	@echo "make test       install and run the tests (minutes)"
	@echo "make test-full  with the slow tests"
	@echo "make lint       ruff check and format check"
	@echo "make types      mypy --strict"
	@echo "make clean      remove .venv, caches and build output (downloaded models stay)"

# torch comes first and alone: its CPU build has to be in place before anything that depends on it is resolved.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lowbit needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^triton==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[gguf,test,lint]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python bench/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

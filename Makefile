# `make demo` and `make test` need CPython 3.11+, make and a package index, nothing else.
# The first run makes .venv and installs into it; later runs find the stamps in .venv and start at once.

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$name; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt

.PHONY: demo test check format lint types bench weights docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      install, describe the regions of a sample image, name the annotated picture"
	@echo "make test      install the test tools, run the tests"
	@echo "make check     format, lint and types, then make test (what CI runs)"
	@echo "make format    format and mend what the linter can mend"
	@echo "make bench     speed and memory of describe: a table, and JSON under out/benchmarks"
	@echo "make weights   train the shipped weights again"
	@echo "make docs      build the documentation into site/"
	@echo "make clean     remove .venv and caches"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "foveate needs CPython 3.11 or newer on PATH, or: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing foveate into $(VENV) (minutes the first time: PyTorch is large)"
	$(INSTALL) -e .
	@touch $@

# pip leaves what already fits alone, so the second stamp only adds the tools.
$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the test tools into $(VENV)"
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/foveate describe docs/images/sample.png --boxes docs/images/sample-boxes.json --picture out/demo/described.png

# One thread each: the tests' tensors are small, and the processes would fight for the cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

# pytest's closing line stays the last one.
check: lint types
	@$(MAKE) --no-print-directory test

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/describe.py --out out/benchmarks/describe.json

weights: $(VENV)/.installed
	$(BIN)/python tools/make_weights.py

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist site

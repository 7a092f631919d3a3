# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv; the second call is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test format lint types tests bench notebooks docs certificates clean

demo: $(VENV)/.installed-viz
	$(BIN)/hooked-lm demo --html demo.html

test: lint types tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-viz
	$(BIN)/python -m benchmarks $(BENCH)

notebooks: $(VENV)/.installed-dev
	$(BIN)/python -m scripts.run_notebooks

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

certificates: $(VENV)/.installed-dev
	$(BIN)/python -m scripts.certify_families

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.html

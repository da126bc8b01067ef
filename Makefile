# make serve | test | test-all | lint | clean. Everything happens in .venv; nothing outside this folder is changed.
# PYTHON picks the interpreter (3.11 to 3.13), ARGS are passed on: make serve ARGS="--port 9000".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The installed Octavo is tested and served, not the sources in this folder, which lack the compiled part.
export PYTHONSAFEPATH := 1
SOURCES := pyproject.toml CMakeLists.txt requirements.lock $(shell find octavo csrc -name '*.py' -o -name '*.cpp' -o -name '*.h')

.PHONY: serve test test-all lint lock clean

serve: $(VENV)/.installed
	@exec $(BIN)/octavo serve $(ARGS)

test: $(VENV)/.tested
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.tested
	$(BIN)/pytest -m "not gpu" $(ARGS)

lint: $(VENV)/.linted
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell octavo csrc tests docs benchmarks *.md

# Rewrites requirements.lock with the newest versions that pyproject.toml admits.
lock: $(VENV)/.linted
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Says what is missing and the one command that brings it, before anything is downloaded.
$(VENV)/bin/python:
	@$(PYTHON) tools/check_machine.py
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.locked: requirements.lock | $(VENV)/bin/python
	@echo "Installing Octavo's dependencies into $(VENV)"
	@$(PIP) install --quiet --require-hashes --only-binary=:all: -r requirements.lock
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.locked
	@echo "Building Octavo (about a minute)"
	@$(PIP) install --quiet --no-deps .
	@touch $@

# The constraints hold torch to one version: without them pip would take the newest build with its CUDA packages.
$(VENV)/.tested: $(VENV)/.installed constraints-test.txt
	@echo "Installing the test extras (torch and transformers are the oracle)"
	@$(PIP) install --quiet -c constraints-test.txt $$($(BIN)/python tools/extras.py test)
	@touch $@

$(VENV)/.linted: pyproject.toml $(VENV)/.locked
	@$(PIP) install --quiet $$($(BIN)/python tools/extras.py dev)
	@touch $@

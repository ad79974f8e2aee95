# `make help` lists the targets. demo, test, lint and bench set up what they need in .venv and touch nothing else.
PYTHON ?= python3
ARGS ?=
# Processes that run the tests, file by file; each takes up to 2 GB.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: demo test lint bench help clean

demo: $(VENV)/.installed-test  ## train the demo on the data the package ships, write outputs/demo (ARGS="--max_steps 20")
	$(BIN)/python examples/train_multitask.py $(ARGS)

test: $(VENV)/.installed-test  ## run the tests (ARGS="-m 'not slow'", ARGS="tests/tasks -x")
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev  ## check format, lint rules and types
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

bench: $(VENV)/.installed-test  ## measure speed, memory, parameters and the data loader next to baselines
	$(BIN)/python benchmarks/bench.py $(ARGS)
	$(BIN)/python benchmarks/loader.py

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'PYTHON=/path/to/python chooses the interpreter (3.10 or newer) for a new $(VENV).'

clean:  ## remove .venv, caches and build products; keep outputs/
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# bin/pip comes last in a new environment, so an interrupted creation is taken up again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'Python 3.10 or newer is needed, and "$(PYTHON)" is not: run make with PYTHON=/path/to/python3.10 or newer.' >&2; \
	  exit 1; }
	@echo 'Creating $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)

# One stamp per extra; the install runs again when one of these three files changes.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing mt-adapters[$*] and its dependencies into $(VENV) (minutes on the first run)'
	@$(PIP_INSTALL) -e ".[$*]"
	@touch $@

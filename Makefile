# Every target sets itself up: Python >= 3.11 and make are all a machine needs.
PYTHON ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# One stamp for each layer: what running needs, what the checks and tests add, what the chart and the image add.
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.development
CHART   := $(VENV)/.chart
INSTALL := $(BIN)/python .ci/install.py

.PHONY: help install demo test check format bench faults mutants lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(RUNTIME): .ci/runtime.lock .ci/build.lock
	@$(PYTHON) -c 'import sys; sys.exit("Call Relay needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Set PYTHON=... to another one.") if sys.version_info < (3, 11) else None'
	@echo 'Setting up $(VENV) with $(PYTHON); this happens once'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) .ci/runtime.lock .ci/build.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): .ci/development.lock $(RUNTIME)
	@$(INSTALL) .ci/development.lock
	@touch $@

$(CHART): .ci/chart.lock $(DEV)
	@$(INSTALL) .ci/chart.lock
	@touch $@

install: $(RUNTIME) ## the virtual environment that running needs, from the hashed locks

demo: $(RUNTIME) ## the whole relay against a simulated provider and a verifying subscriber
	@$(BIN)/relay demo $(ARGS)

test: $(CHART) ## the whole suite
	$(BIN)/python -m pytest $(ARGS)

check: $(CHART) ## lint, format, imports and types: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python .ci/chart_readme.py --check
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; else echo 'hadolint has no build for this platform: the Dockerfile was not linted'; fi

format: $(DEV) ## reformat the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench: $(DEV) ## measure the figures of benchmarks/README.md
	$(BIN)/python -m benchmarks $(ARGS)

faults: $(DEV) ## the long fault runs
	$(BIN)/python -m pytest -m "faults" --long tests/faults $(ARGS)

mutants: $(DEV) ## break one rule after the other, and list those that no test notices
	@$(BIN)/python -m tests.mutants $(ARGS)

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate

lock: $(RUNTIME) ## resolve the hashed locks again, with uv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) $(UPGRADE) pyproject.toml -o .ci/runtime.lock
	$(LOCK) $(UPGRADE) pyproject.toml --group dev -o .ci/development.lock
	$(LOCK) $(UPGRADE) --group build -c .ci/runtime.lock -o .ci/build.lock
	$(LOCK) $(UPGRADE) --group chart -c .ci/development.lock -o .ci/chart.lock

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Every target sets itself up: Python >= 3.11 and make are all a machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CHART  := $(VENV)/.chart

.PHONY: help install demo test check format bench faults lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(STAMP): .ci/development.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Call Relay needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Set PYTHON=... to another one.") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/development.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# What renders and checks the chart and the Dockerfile: 350 MB, so in a group of its own.
$(CHART): .ci/chart.lock $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/chart.lock
	@touch $(CHART)

install: $(STAMP) ## the virtual environment, from the hashed lock

demo: $(STAMP) ## the whole relay against a simulated provider and a verifying subscriber
	$(BIN)/relay demo $(ARGS)

test: $(STAMP) $(CHART) ## the whole suite
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) $(CHART) ## lint, format and types: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/chart_readme.py --check
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; else echo 'hadolint has no build for this platform: the Dockerfile was not linted'; fi

format: $(STAMP) ## rewrite the code in the house's format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench: $(STAMP) ## the figures of benchmarks/README.md, measured now
	$(BIN)/python -m benchmarks $(ARGS)

faults: $(STAMP) ## the long fault runs
	$(BIN)/python -m pytest -m "faults" --long tests/faults $(ARGS)

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate

lock: $(STAMP) ## make the hashed locks again (with uv, brought in for the occasion)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) $(UPGRADE) pyproject.toml -o .ci/runtime.lock
	$(LOCK) $(UPGRADE) pyproject.toml --group dev -o .ci/development.lock
	$(LOCK) $(UPGRADE) --group build -o .ci/build.lock
	$(LOCK) $(UPGRADE) --group chart -c .ci/development.lock -o .ci/chart.lock

clean: ## forget the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

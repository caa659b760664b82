# `make` lists the targets. Each makes what it needs; nothing is started by hand.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 1
# PyTorch's own index for another build, such as TORCH_INDEX=<index of CUDA builds>; empty = the default index.
# It gives torch alone, and at the first make only; what torch needs comes from the default index.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-long check format golden bench-model clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[worker,embedded,dev]'
	touch $@

demo: $(READY) ## run the main job on embedded servers: WORKERS=n, pictures in out/
	@$(BIN)/fuseline demo --workers $(WORKERS)

serve: $(READY) ## start Valkey, API and workers, print their URLs, run until Ctrl-C
	@$(BIN)/fuseline serve --workers $(WORKERS)

test: $(READY) ## run every test that an everyday run needs (under 10 minutes)
	$(BIN)/python -m pytest -m 'not long' $(ARGS)

test-long: $(READY) ## run the long proofs, and say what they covered
	$(BIN)/python -m pytest -m long -rA --timeout 3600 $(ARGS)

check: $(READY) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## let ruff format and sort
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(READY) ## rewrite golden files and generated references; review the diff
	$(BIN)/python -m tests.golden

bench-model: $(READY) ## measure the bundled model and its LoRAs; the last line is JSON
	@$(BIN)/python -m examples.shapes.measure

clean: ## remove what runs left behind; the virtual environment stays
	rm -rf out var build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

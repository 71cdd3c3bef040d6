# make train | test | test-slow | test-all | lint | bench | docs | clean  (VENV=... another environment, PYTHON=... another interpreter)

PYTHON ?= python3
VENV ?= .venv
# extra words for the program that the target runs: make train ARGS="seed=1", make test ARGS="-k returns"
ARGS ?=

BIN := $(VENV)/bin
# Libraries that thread by themselves and test processes side by side slow each other down.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: train test test-slow test-all lint bench docs clean

train: $(VENV)/.installed-demo
	$(BIN)/python examples/train_td_lambda.py $(ARGS)

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# what takes longer; nothing is checked twice
test-slow: $(VENV)/.installed-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not soak" $(ARGS)

# both in one go
test-all: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.installed-demo
	$(ONE_THREAD) $(BIN)/python benchmarks/run.py $(ARGS)

# the site in build/docs, made anew, with its notebooks run, and a warning taken for an error
docs: $(VENV)/.installed-docs
	$(ONE_THREAD) $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/docs $(ARGS)
	@echo "the site begins at build/docs/index.html"

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: installed again only when what is to be installed has changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$*]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # on all cores, and pip would take one
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

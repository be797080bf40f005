# make test        lint, then all tests
# make test-fast   quick tests, at least one of every feature, in about a minute
# make lint        style and types
# make docs        the documentation as a website in site/
# make demo        distill a student on a small synthetic data set and compare it with its teacher
# make pictures    rebuild the pictures of README and docs
# All targets create the environment in .venv on first use: dependencies, and Detectron2.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Several tests run at once with one thread each; three fill two cores, because slow ones wait for processes. Bytecode is
# kept whatever the environment says, because each of many processes would compile all tests and modules again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist worksteal

.PHONY: setup lint test test-fast docs demo pictures clean

setup: $(READY)

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test]"
	$(BIN)/spar-d2 install-detectron2
	@touch $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

test: lint
	$(PYTEST) --numprocesses 3

test-fast: $(READY)
	$(PYTEST) --numprocesses 2 -m "not slow and not processes"

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo: $(READY)
	$(BIN)/python -W ignore::FutureWarning -m spar_d2.cli toy

pictures: $(READY)
	$(BIN)/python -W ignore::FutureWarning tools/toy/pictures.py

clean:
	rm -rf $(VENV) output datasets site

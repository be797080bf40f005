# make test   run all tests
# make demo   distill a student in a small drawn world and compare it with its teacher
# Each sets up what is missing first: a virtual environment in .venv, the dependencies, Detectron2.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup test demo lint clean

setup: $(READY)

$(READY): setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test]"
	$(BIN)/python tools/install_detectron2.py
	@touch $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Most tests are small, or wait for a process: several at once, on one thread each, end sooner.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

demo: $(READY)
	$(BIN)/python -W ignore::FutureWarning tools/run_demo.py

clean:
	rm -rf $(VENV) output datasets

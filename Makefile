# Everything a contributor runs. The first call of a target fills .venv (minutes), later ones start at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_FOLDER ?= .cache/load-benchmark
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test lint bench clean

help:
	@echo 'make demo    generate text with the small model inside the package'
	@echo 'make test    all tests that need no GPU'
	@echo 'make lint    ruff, mypy, import-linter'
	@echo 'make bench   the benchmarks, against their peers (minutes, and 5 GB in $(BENCH_FOLDER))'
	@echo 'make clean   remove .venv and caches'
	@echo 'PYTHON=...   the interpreter for .venv (3.11 or newer; default python3)'

demo: $(VENV)/installed
	$(BIN)/moezoo generate --prompt 'Once upon a time' --max-new-tokens 120 --seed 2 --dtype float32

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile -m 'not gpu'

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/load.py --folder $(BENCH_FOLDER)
	$(BIN)/python benchmarks/generate.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "moezoo needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "'$(PYTHON)' lacks the venv module (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

# Python compiles the quarter of the files that is imported; pip would take a minute for all.
$(VENV)/installed-dev: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[dev,plots]'
	touch $(VENV)/installed $@

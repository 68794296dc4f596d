# Entrances: `make demo` shows the whole thing, `make test` proves it, `make serve` puts it behind
# http://127.0.0.1:8000, `make docs` builds the pages.
# Each creates .venv and installs what it needs; nothing has to be there but Python >= 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two workers by default: the suite is sized for two cores.
JOBS   ?= 2

# What `make serve` serves, and its options.
SERVE  ?= starter

.PHONY: demo serve test lint docs clean

demo: $(VENV)/.installed
	$(BIN)/blockdiff demo --out runs/demo --overwrite

serve: $(VENV)/.installed-serve
	$(BIN)/blockdiff serve $(SERVE)

docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[serve]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-serve

clean:
	rm -rf $(VENV) build dist site src/*.egg-info

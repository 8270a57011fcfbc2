# Each target works as the first command on a fresh clone: it sets up .venv when it has to.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
# Three tests at a time, since some wait more than they compute; a file in one process.
TOGETHER := -n 3 --dist loadfile

.PHONY: setup demo test test-all check format bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/avlm demo

test: $(READY)
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest $(TOGETHER)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(PEERS): pyproject.toml constraints.txt $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $(PEERS)

bench: $(PEERS)
	$(BIN)/python bench/run.py
	$(BIN)/python bench/train.py --out bench/results

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

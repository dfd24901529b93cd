# Everything a newcomer needs: `make run`, `make test`. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PROMPT ?= What is the capital of France?

.PHONY: run test lint oracle sanitize native clean help

help:                    ## what there is
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*##/ -/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml CMakeLists.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test,dev]'
	touch $@

$(VENV)/.oracles: $(VENV)/.tools
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[oracle]'
	touch $@

run: $(VENV)/.installed  ## build, install and answer from the embedded model
	$(BIN)/paceline run --prompt "$(PROMPT)"

test: $(VENV)/.oracles   ## everything the project asserts, with torch and transformers as oracles
	$(BIN)/python -m pytest

lint: $(VENV)/.tools     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

sanitize: $(VENV)/.tools ## native tests under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" tools/sanitize.sh

clean:
	rm -rf $(VENV) build

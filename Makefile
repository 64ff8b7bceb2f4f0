PYTHON ?= python3
BIN := .venv/bin

.PHONY: help book test clean

help:
	@echo "make book    set up .venv, execute the chapters, build _build/html"
	@echo "make test    the same, then lint and every test"
	@echo "make clean   remove what both of them made (and .venv)"

# .venv is made anew when its list of packages changes; PYTHON=python3.12 chooses another interpreter.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "No environment could be made: install it first, with 'sudo apt-get install python3-venv'."; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

book: .venv/installed
	$(BIN)/python tools/build_book.py

test: book
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

clean:
	rm -rf _build build dist .venv predoc_lib.egg-info

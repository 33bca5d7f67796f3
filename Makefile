# Everything that is done with this repository. Each target makes .venv by itself when it is missing.
# Needs: Python >= 3.10 with venv and headers, make, a C++20 compiler. `make demo` and `make test` are the place to start.

PYTHON ?= python3
CXX ?= g++
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q
NATIVE := pyproject.toml CMakeLists.txt constraints.txt $(shell find native -name '*.cc' -o -name '*.h' -o -name '*.inc')
comma := ,
CXX_SOURCES := $(shell find native -name '*.cc' -o -name '*.h')

.PHONY: setup peers quantizers demo test test-all test-native test-arm test-sanitize lint format docs bench clean check-tools check-cmake check-native check-arm

setup: .venv/.base

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "tersor needs Python >= 3.10: sudo apt-get install python3 python3-venv python3-dev"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "tersor needs Python >= 3.10, got $$($(PYTHON) -V); choose one with: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: sudo apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "Python's headers are missing: sudo apt-get install python3-dev"; exit 2; }
	@command -v $(CXX) >/dev/null || { echo "A C++20 compiler is missing: sudo apt-get install g++"; exit 2; }
	@echo '#include <bit>' | $(CXX) -std=c++20 -fsyntax-only -x c++ - 2>/dev/null || { echo "$(CXX) does not compile C++20; g++ >= 11 or clang++ >= 14 does: sudo apt-get install g++"; exit 2; }

.venv/bin/python: | check-tools
	$(PYTHON) -m venv .venv

# The package with what it needs to run; the extension is compiled here.
.venv/.base: $(NATIVE) | .venv/bin/python check-tools
	CXX=$(CXX) $(PIP) -e .
	@touch $@

# What the tests and the lint need besides (torch, transformers and compressed-tensors are the oracles).
.venv/.test: .venv/.base
	$(PIP) torch==2.13.0
	CXX=$(CXX) $(PIP) -e '.[test,lint]'
	@touch $@

# The peers of the benchmarks; llama-cpp-python compiles llama.cpp for this machine (about ten minutes on two cores). On a CPU with AMX,
# GCC 12 takes most stores to its tile configuration for dead (GCC's intrinsic reads 8 bytes of 64), and the first product faults.
LLAMA_FLAGS := $(if $(shell grep -m1 -o amx_tile /proc/cpuinfo 2>/dev/null),-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse")
.venv/.bench: .venv/.test
	CMAKE_ARGS='$(LLAMA_FLAGS)' $(PIP) -e '.[bench]'
	@touch $@

# Peers whose dependencies clash with ours, each in an environment of its own: `peers` run models (3 GB; the last two compile llama.cpp, for
# AVX2 only and with BLAS; no cache, which would give each the other's wheel), `quantizers` make them (`benchmarks quality`; 5 GB).
PEER_PIP := PIP_DISABLE_PIP_VERSION_CHECK=1
QUANTIZERS := gptqmodel==7.6.0 auto-round==0.16.0 llmcompressor==0.14.0 bitsandbytes==0.50.0
peers: .peers/.openvino .peers/.onnxruntime .peers/.llama-avx2 .peers/.llama-blas
quantizers: $(foreach package,$(QUANTIZERS),.peers/.$(firstword $(subst ==, ,$(package))))

define QUANTIZER
.peers/.$(firstword $(subst ==, ,$(1))): | check-tools
	$$(PYTHON) -m venv .peers/$(firstword $(subst ==, ,$(1)))
	$$(PEER_PIP) .peers/$(firstword $(subst ==, ,$(1)))/bin/python -m pip install -q torch==2.13.0
	$$(PEER_PIP) .peers/$(firstword $(subst ==, ,$(1)))/bin/python -m pip install -q $(1) $$(NEEDED_BY_$(firstword $(subst ==, ,$(1))))
	@touch $$@
endef
NEEDED_BY_bitsandbytes := transformers==5.24.0 accelerate  # the others bring the transformers that they want
$(foreach package,$(QUANTIZERS),$(eval $(call QUANTIZER,$(package))))

.peers/.openvino: | check-tools
	$(PYTHON) -m venv .peers/openvino
	$(PEER_PIP) .peers/openvino/bin/python -m pip install -q torch==2.13.0
	$(PEER_PIP) .peers/openvino/bin/python -m pip install -q openvino==2026.4.1 nncf==3.4.0 optimum-intel==2.2.0
	.peers/openvino/bin/python -m pip uninstall -q -y torchvision  # not needed, and transformers stops when it is not made for this torch
	@touch $@

.peers/.onnxruntime: | check-tools
	$(PYTHON) -m venv .peers/onnxruntime
	$(PEER_PIP) .peers/onnxruntime/bin/python -m pip install -q torch==2.13.0
	$(PEER_PIP) .peers/onnxruntime/bin/python -m pip install -q onnxruntime-genai==0.18.0 onnx==1.23.2 onnx-ir==1.1.0 transformers==5.24.0
	@touch $@

.peers/.llama-avx2: | check-tools
	$(PYTHON) -m venv .peers/llama-avx2
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF" \
	  $(PEER_PIP) .peers/llama-avx2/bin/python -m pip install -q --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

# llama.cpp whose prompts are multiplied in float32 (`benchmarks containers`): needs libopenblas-dev and pkg-config.
.peers/.llama-blas: | check-tools
	$(PYTHON) -m venv .peers/llama-blas
	CMAKE_ARGS='-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS $(LLAMA_FLAGS)' \
	  $(PEER_PIP) .peers/llama-blas/bin/python -m pip install -q --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

demo: .venv/.base
	$(BIN)/python -m tersor.demo

# Hypothesis draws the same examples each time here (its profile "ci"), so that a commit fails for what it changed;
# `make test-all` draws new ones.
test: .venv/.test
	$(BIN)/python -m pytest -m 'not slow' --hypothesis-profile=ci

test-all: .venv/.bench .peers/.gptqmodel
	TERSOR_PYTHON_GPTQMODEL=$(CURDIR)/.peers/gptqmodel/bin/python $(BIN)/python -m pytest

# The native runtime by itself, without Python: native/kernels/kernel_test.cc. Every instruction set of this CPU; an ARM
# CPU with and one without dot products, both emulated; under the sanitizers.
KERNEL_TEST = CXX=$(CXX) cmake -S . -B build/$(1) -DTERSOR_PYTHON=OFF $(2) >build/$(1).log && \
	cmake --build build/$(1) --target kernel_test -j$$(getconf _NPROCESSORS_ONLN) >>build/$(1).log || { tail -n 30 build/$(1).log; exit 1; }
SANITIZER = -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$(1)"
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu

check-cmake:
	@command -v cmake >/dev/null || { echo "cmake is missing: sudo apt-get install cmake"; exit 2; }
	@mkdir -p build

check-native: check-cmake
	@command -v $(CXX) >/dev/null || { echo "A C++20 compiler is missing: sudo apt-get install g++"; exit 2; }

check-arm: check-cmake
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "The ARM compiler is missing: sudo apt-get install g++-aarch64-linux-gnu"; exit 2; }
	@command -v qemu-aarch64 >/dev/null || { echo "The ARM emulator is missing: sudo apt-get install qemu-user"; exit 2; }

test-native: check-native
	$(call KERNEL_TEST,native)
	build/native/kernel_test

test-arm: check-arm
	$(call KERNEL_TEST,arm,-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake)
	$(QEMU) -cpu max build/arm/kernel_test
	$(QEMU) -cpu cortex-a53 build/arm/kernel_test

test-sanitize: check-native
	$(call KERNEL_TEST,sanitize-address,$(call SANITIZER,address$(comma)undefined))
	build/sanitize-address/kernel_test
	$(call KERNEL_TEST,sanitize-thread,$(call SANITIZER,thread))
	build/sanitize-thread/kernel_test

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python -m tersor.formats.page --check docs/formats.md
	$(BIN)/python -m tersor.cli.page --check docs/cli.md

format: .venv/.test
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: .venv/.base
	$(BIN)/python -m tersor.formats.page > docs/formats.md
	$(BIN)/python -m tersor.cli.page > docs/cli.md

# BENCH_MODELS: the folder where the models of `benchmarks engine` lie or are made (16 GB); in all about two hours on two cores.
BENCH_MODELS ?= build/models
bench: .venv/.bench peers
	$(BIN)/python -m benchmarks all $(BENCH_MODELS)

clean:
	rm -rf .venv .peers build demo

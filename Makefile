# Everything is made in build/ and dist/. Needs Python >= 3.10, a C++20 compiler
# and the Python package index; `make` alone prints the targets.

PYTHON ?= python3
BACKEND ?= $(if $(filter Darwin,$(shell uname -s)),metal,cpu)
VENV := build/venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find cmake overlay python \
	-type f -not -name '*.pyc')

ifeq ($(filter $(BACKEND),cpu cuda metal),)
$(error BACKEND must be cpu, cuda or metal; got $(BACKEND))
endif

export PATH := $(BIN):$(PATH)
# What the test suites said last, for record_tests.py.
JUNIT := --junitxml=$(CURDIR)/build/junit
export QUANTIZED_SDPA_BACKEND := $(BACKEND)

.PHONY: help
help:
	@echo 'make wheel      build dist/mlx_quantized_sdpa-*.whl (BACKEND=cuda: for mlx[cuda13])'
	@echo 'make wheel-macos  cross-build wheels for arm64 macOS 14 (needs ld64.lld)'
	@echo 'make test       build, install into $(VENV), run the tests'
	@echo 'make test SAN=address,undefined  those of the op with sanitizers, or SAN=thread'
	@echo 'make test-vlm   the caches in models of mlx-vlm (Python >= 3.11)'
	@echo 'make test-cpp   C++ tests of codecs, plan and errors (needs doctest)'
	@echo 'make test-metal the Metal kernels on the CPU, lane by lane (needs Clang 19)'
	@echo 'make fuzz       drawn calls against float64 (N=10000 DEVICE=cpu)'
	@echo 'make soak       random lives of the caches (STEPS=100000)'
	@echo 'make mutate     plant faults; the tests must notice each'
	@echo 'make metal-counts  what the Metal kernels load and multiply, counted'
	@echo 'make test-cuda  the CUDA launch and kernels on an emulated GPU'
	@echo 'make test-cuda-wheel  the CUDA wheel in MLX'"'"'s CUDA library, without a driver'
	@echo 'make demo       the main job: generate text over dense and quantized caches'
	@echo 'make bench      time the op on the default device against what it replaces'
	@echo 'make bench-cpu  time the CPU kernels against stock MLX and installed rivals'
	@echo 'make bench-gpu  time the op on a GPU against stock MLX and PyTorch'
	@echo 'make bench-rivals  install those rivals (llama.cpp takes minutes to build)'
	@echo 'make figures    README.md'"'"'s tables anew from bench/results'
	@echo 'make report     docs/evidence.html: all that was shown, from bench/results'
	@echo 'make record-tests  count what the suites said last, for the report'
	@echo 'make venv       only the environment, with the wheel installed'
	@echo 'make lint       formatters and checks, changing nothing'
	@echo 'make format     let the formatters change the files'
	@echo 'make apply      build/mlx: MLX with patches/ applied, overlay/ linked in'
	@echo 'make refresh    edits made in build/mlx flow back to patches/ and overlay/'
	@echo 'make check      lint; the series applies to MLX and refresh changes nothing'
	@echo 'make series     build/series/*.patch, complete, for git am'
	@echo 'make drift      how the series stands against MLX_REF='
	@echo 'make clean      remove build/ and dist/'

$(VENV)/build.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
		sys.exit("Python 3.10 or newer is needed; PYTHON= names another")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade 'pip>=25.1'
	$(INSTALL) --group build
	touch $@

$(VENV)/build-cuda.stamp: $(VENV)/build.stamp
	$(INSTALL) --group cuda
	touch $@

# Without isolation, so that CMake's build directory serves the next build too.
# setuptools would pack files that are no longer in the sources: build/lib* goes.
build/wheel-$(BACKEND).stamp: $(VENV)/build.stamp $(SOURCES) \
	$(if $(filter cuda,$(BACKEND)),$(VENV)/build-cuda.stamp)
	rm -rf build/lib* dist/mlx_quantized_sdpa-*.whl
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--check-build-dependencies --wheel-dir dist .
	rm -f build/wheel-*.stamp
	touch $@

.PHONY: wheel
wheel: build/wheel-$(BACKEND).stamp
	@ls dist/*.whl

# One for each Python whose headers are installed.
.PHONY: wheel-macos
wheel-macos: build/wheel-$(BACKEND).stamp
	$(INSTALL) --group cross
	$(BIN)/python scripts/wheel_macos.py dist/mlx_quantized_sdpa-*.whl
	@ls dist/macos/*.whl

$(VENV)/installed.stamp: build/wheel-$(BACKEND).stamp
	$(INSTALL) --group test
	$(INSTALL) --force-reinstall --no-deps dist/mlx_quantized_sdpa-*.whl
	touch $@

.PHONY: venv
venv: $(VENV)/installed.stamp

# With SAN= the tests of the op on a build with those sanitizers.
.PHONY: test
ifdef SAN
test: test-san
else
test: $(VENV)/installed.stamp
	$(BIN)/pytest -n 2 $(JUNIT)/test.xml --ignore python_tests/metal \
		--ignore python_tests/cuda python_tests
endif

# Caches in mlx-vlm's models, installed without what images and sound need.
.PHONY: test-vlm
test-vlm: $(VENV)/installed.stamp
	$(INSTALL) --group vlm
	$(INSTALL) --no-deps mlx-vlm==0.7.10
	$(BIN)/python -c 'import mlx_vlm.models.cache'
	$(BIN)/pytest $(JUNIT)/vlm.xml python_tests/test_kv_cache_vlm.py

# Needs clang++ 19 or newer on x86-64 Linux; METAL_TESTS= takes pytest's arguments.
METAL_TESTS ?= -n 2

# The installed package stays out of the way of the one that they build.
.PHONY: test-metal
test-metal metal-counts: export MLX_QUANTIZED_SDPA_AUTOLOAD = 0
test-metal: $(VENV)/installed.stamp
	$(BIN)/python python_tests/metal/rig/toolchain.py
	$(BIN)/pytest $(METAL_TESTS) $(JUNIT)/metal.xml python_tests/metal
	PYTHONPATH=python_tests/metal $(BIN)/pytest -p fake_plugin $(METAL_TESTS) \
		$(JUNIT)/metal-op.xml python_tests/test_fast_quantized_sdpa.py \
		python_tests/test_quantized_sdpa_nonfinite.py \
		python_tests/test_quantized_sdpa_errors.py::TestHostileValues

.PHONY: test-cpp
test-cpp: build/wheel-$(BACKEND).stamp
	$(BIN)/cmake --build build/temp.*/mlx_quantized_sdpa._ext \
		--target quantized_sdpa_tests
	build/temp.*/mlx_quantized_sdpa._ext/quantized_sdpa_tests

# The CUDA backend on an emulated GPU.
.PHONY: test-cuda
test-cuda: $(VENV)/installed.stamp
	scripts/emulate_cuda.sh -n 2 $(JUNIT)/cuda.xml python_tests/cuda

# Its wheel in MLX's own CUDA library, which a stand-in for the driver serves.
.PHONY: test-cuda-wheel
test-cuda-wheel:
	$(MAKE) wheel BACKEND=cuda
	scripts/stand_in_cuda.sh $(JUNIT)/cuda-wheel.xml python_tests/cuda/stand_in \
		python_tests/cuda/test_quantized_sdpa_prefill.py

# SAN_TESTS= takes pytest's arguments, QUANTIZED_SDPA_CALLS= calls of each thread.
SAN_TESTS ?= -n 2 $(wildcard python_tests/test_*quantized_sdpa*.py)

comma := ,

.PHONY: test-san
test-san: SAN := $(or $(SAN),address$(comma)undefined)
test-san: $(VENV)/installed.stamp
	scripts/sanitize.sh '$(SAN)' $(JUNIT)/san-$(subst $(comma),-,$(SAN)).xml $(SAN_TESTS)

# N calls on DEVICE; a failure is shrunk and printed.
N ?= 10000
DEVICE ?= cpu

.PHONY: fuzz
fuzz: $(VENV)/installed.stamp
	$(BIN)/python scripts/fuzz.py --calls $(N) --device $(DEVICE) --label $(DEVICE) \
		--record build/fuzz.json

# Decoding over caches that live random lives, against lists of their tokens.
STEPS ?= 100000

.PHONY: soak
soak: $(VENV)/installed.stamp
	$(BIN)/python scripts/soak.py --steps $(STEPS) --record build/soak.json

# MUTATE=window plants only faults with that word; each must be noticed.
.PHONY: mutate
mutate: $(VENV)/installed.stamp
	$(BIN)/python scripts/mutate.py $(MUTATE)

# Bytes, matrix products and barriers of the Metal kernels, counted on the CPU.
.PHONY: metal-counts
metal-counts: $(VENV)/installed.stamp
	$(BIN)/python bench/metal_counts.py

$(VENV)/demo.stamp: $(VENV)/installed.stamp
	$(INSTALL) --group demo
	touch $@

.PHONY: demo
demo: $(VENV)/demo.stamp
	$(BIN)/python bench/demo.py

$(VENV)/bench.stamp: $(VENV)/installed.stamp
	$(INSTALL) --group bench
	touch $@

.PHONY: bench-rivals
bench-rivals: $(VENV)/bench.stamp
	$(INSTALL) -r bench/requirements.txt

.PHONY: bench
bench: $(VENV)/bench.stamp
	$(BIN)/python bench/quantized_sdpa_bench.py $(BENCH)

# BENCH='--quick' and the like; `python bench/cpu_bench.py --help` names them.
.PHONY: bench-cpu
bench-cpu: $(VENV)/bench.stamp
	$(BIN)/python bench/cpu_bench.py $(BENCH)

# On a machine with a GPU, with BACKEND=cuda or metal.
.PHONY: bench-gpu
bench-gpu: $(VENV)/bench.stamp
	$(BIN)/python bench/gpu_bench.py $(BENCH)

# README.md's tables from the records; make lint fails where they differ.
.PHONY: figures
figures:
	$(PYTHON) bench/figures.py

.PHONY: report
report: $(VENV)/installed.stamp
	$(BIN)/python bench/fused.py
	$(BIN)/python bench/evidence.py

# Counts the tests that the suites ran last.
.PHONY: record-tests
record-tests:
	$(PYTHON) bench/record_tests.py

build/lint-venv/lint.stamp: pyproject.toml
	$(PYTHON) -m venv build/lint-venv
	build/lint-venv/bin/pip install --quiet --upgrade 'pip>=25.1'
	build/lint-venv/bin/pip install --quiet --group lint
	touch $@

.PHONY: lint
lint: build/lint-venv/lint.stamp
	PATH="$(CURDIR)/build/lint-venv/bin:$$PATH" scripts/lint.sh

.PHONY: format
format: build/lint-venv/lint.stamp
	PATH="$(CURDIR)/build/lint-venv/bin:$$PATH" scripts/lint.sh fix

# MLX_SRC= names another clone of MLX than the submodule. build/mlx is built as
# MLX's own documentation says: docs/src/install.rst there.
SERIES := PYTHONPATH=scripts $(PYTHON) -m series

.PHONY: apply refresh drift
apply refresh drift:
	@$(SERIES) $@

.PHONY: check
check: lint
	@$(SERIES) check

.PHONY: series
series:
	@$(SERIES) export

.PHONY: clean
clean:
	rm -rf build dist

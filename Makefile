# Everything happens in .venv, which these targets make. What was done once is not done again (the files .venv/.done-*).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PIP_INSTALL := $(PIP) install -qq --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(shell find src/mnemos native -type f ! -name '*.so' ! -name '*.pyc' 2>/dev/null)

# The bytecode of the tests is kept, whatever the environment says: compiling it costs every process some seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo serve test quick lint pytest bench native native-tools native-tests sanitize test-neon wheel clean

help:
	@echo 'make demo    build Mnemos, fetch a small model once and let it answer a question'
	@echo 'make serve   serve the small model: a page, and the APIs that clients know'
	@echo 'make test    lint, types and all tests'
	@echo 'make quick   ruff, mypy, the tests that are fast and need no PyTorch, the kernels of one level: before each commit'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make native  rebuild the native core in place, for work on it'
	@echo 'make native-tests  build the checks of the native core that run outside Python'
	@echo 'make wheel   build a wheel into dist/'
	@echo 'make sanitize   run the native tests under AddressSanitizer and UBSan'
	@echo 'make test-neon  run the Arm kernels under qemu-user (Debian: g++-aarch64-linux-gnu, qemu-user)'
	@echo 'make bench   measure this machine with the small model'
	@echo 'make clean   remove .venv and build files'

demo: $(VENV)/.done-install
	@$(BIN)/mnemos generate smollm2-135m 'Why is the sky blue? Answer in two sentences.'

serve: $(VENV)/.done-install
	@$(BIN)/python -c 'import fastapi, uvicorn, prometheus_client' 2>/dev/null || $(PIP_INSTALL) fastapi uvicorn prometheus-client
	@$(BIN)/mnemos serve smollm2-135m

test: lint pytest

lint: $(VENV)/.done-dev
	@echo '== ruff' && $(BIN)/ruff check .
	@echo '== mypy' && $(BIN)/mypy

quick: lint
	@echo '== pytest, without PyTorch and slow tests, the fastest kernels alone'
	@$(BIN)/python -m pytest -n auto --dist worksteal --without-torch --one-level -m 'not slow'

# A process for each core, each with the tests of its part of the tree; who is done takes some of another's.
pytest: $(VENV)/.done-dev
	@log=$$(ls -t build/cp*/.ninja_log 2>/dev/null | head -n 1); \
		$(MAKE) -s native-tests KERNELS="$${log:+$(CURDIR)/$$(dirname "$$log")/native/CMakeFiles/kernels.dir}"
	@echo '== pytest' && $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

bench: $(VENV)/.done-install
	@$(BIN)/mnemos bench smollm2-135m

# The native core alone, into the source tree; the module is replaced in one move, so that running programs keep theirs.
NATIVE_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(shell command -v $(PYTHON)))
NATIVE_FLAGS ?=
NATIVE_BUILD ?= build/native
NATIVE_CMAKE = PATH="$$(dirname $(NATIVE_PYTHON)):$$PATH" cmake
native: native-tools
	@$(NATIVE_CMAKE) -S . -B $(NATIVE_BUILD) -G Ninja -DPython_EXECUTABLE="$(NATIVE_PYTHON)" $(NATIVE_FLAGS) >/dev/null
	@$(NATIVE_CMAKE) --build $(NATIVE_BUILD)
	@cd $(NATIVE_BUILD)/native && for file in _native*.so; do cp $$file $(CURDIR)/src/mnemos/.$$file.new && mv $(CURDIR)/src/mnemos/.$$file.new $(CURDIR)/src/mnemos/$$file; done

# CMake, Ninja and nanobind, where they are not there.
native-tools:
	@PATH="$$(dirname $(NATIVE_PYTHON)):$$PATH" && command -v cmake >/dev/null && command -v ninja >/dev/null \
		&& $(NATIVE_PYTHON) -c 'import nanobind' 2>/dev/null || $(NATIVE_PYTHON) -m pip install -qq cmake ninja nanobind

# The programs of native/tests; tests/ops/test_tiles.py runs the one that is built here. KERNELS names the folder of the
# object files that the installation has left, so that they are not compiled twice.
KERNELS ?=
native-tests: native-tools
	@echo '== building the checks of the native core'
	@$(NATIVE_CMAKE) -S . -B build/tests -G Ninja -DMNEMOS_TESTS=ON -DMNEMOS_KERNELS="$(KERNELS)" >/dev/null
	@$(NATIVE_CMAKE) --build build/tests

wheel: $(VENV)/.done-venv
	@$(PIP) wheel -q --disable-pip-version-check --no-deps --wheel-dir dist .

# The operators' tests under AddressSanitizer and UBSan, with a build of their own that nothing else uses.
SANITIZED := build/sanitize
sanitize: native-tools
	@$(NATIVE_CMAKE) -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE="$(NATIVE_PYTHON)" -DMNEMOS_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug >/dev/null
	@$(NATIVE_CMAKE) --build $(SANITIZED)
	@rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package && cp -r src/mnemos $(SANITIZED)/package/
	@rm -f $(SANITIZED)/package/mnemos/_native*.so && cp $(SANITIZED)/native/_native*.so $(SANITIZED)/package/mnemos/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=$(SANITIZED)/package PYTHONDONTWRITEBYTECODE=1 $(NATIVE_PYTHON) -m pytest tests/ops -p no:cacheprovider

test-neon:
	native/tests/run.sh neon

clean:
	rm -rf $(VENV) build

$(VENV)/.done-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Mnemos needs Python 3.10 or newer, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	@echo '== creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { echo 'make: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)'; exit 1; }
	@touch $@

$(VENV)/.done-install: $(VENV)/.done-venv $(SOURCES)
	@echo '== building and installing Mnemos (a minute or two the first time)'
	@$(PIP_INSTALL) .
	@touch $@

$(VENV)/.done-dev: $(VENV)/.done-install
	@echo '== installing what the tests need, PyTorch among it (some minutes the first time)'
	@$(PIP_INSTALL) 'mnemos[dev]'
	@touch $@

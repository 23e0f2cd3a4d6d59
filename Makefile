# SPDX-License-Identifier: Apache-2.0
VENV ?= .venv
JOBS ?= $(shell nproc)
export PATH := $(abspath $(VENV))/bin:$(PATH)
python := $(abspath $(VENV))/bin/python
ready := $(VENV)/.voxgemm-ready
configure := cmake -DPython_EXECUTABLE=$(python) --preset
formatted := python dropin tests/python tests/dropin tools cmake examples bench
sources := git ls-files -co --exclude-standard --

.PHONY: setup build demo test test-oldest check format format-check tidy rules typing asan tsan wheel wheel-test bench clean

setup: $(ready)
$(ready): tools/setup.sh pyproject.toml CMakeLists.txt $(wildcard dropin/*/pyproject.toml)
	tools/setup.sh $(VENV)
	touch $@

build: setup
	@test -f build/release/build.ninja || $(configure) release
	cmake --build build/release -j $(JOBS)

# Torch's threads spin while they wait, which beside another program costs more than it saves (docs/decisions/0005).
demo: build
	OMP_WAIT_POLICY=PASSIVE voxgemm demo $(FILE)

test: build
	ctest --test-dir build/release --output-on-failure -j $(JOBS)
	$(python) -m pytest
	$(python) tools/check_rules.py

# The same libraries under the oldest torch that is supported: for one whose environment is at hand, OLDEST=FOLDER.
OLDEST ?= build/oldest
test-oldest: build
	tools/test_oldest.sh $(OLDEST)

bench: build
	voxgemm bench

# Everything a change must pass.
check: setup format-check rules typing
	$(configure) ci
	cmake --build build/ci -j $(JOBS)
	$(MAKE) tidy test

format:
	$(sources) '*.h' '*.cpp' '*.cuh' '*.cu' | xargs clang-format -i
	ruff format $(formatted)

format-check:
	$(sources) '*.h' '*.cpp' '*.cuh' '*.cu' | xargs clang-format --dry-run -Werror
	ruff format --check $(formatted)
	ruff check $(formatted)

typing:
	mypy

# After a configured build, which writes the compile commands.
tidy:
	run-clang-tidy -quiet -p build/ci -j $(JOBS) "$(CURDIR)/(src|torch|tests/cpp)/.*\.cpp$$"

rules:
	python3 tools/check_rules.py

asan tsan: setup
	$(configure) $@
	cmake --build build/$@ -j $(JOBS)
	ctest --test-dir build/$@ --output-on-failure -j $(JOBS)

wheel: setup
	rm -rf dist
	$(python) -m pip wheel . --no-deps -w dist
	@wc -c dist/*.whl

# One file on the oldest torch that is supported and on the newest there is.
wheel-test: wheel
	tools/wheel_test.sh dist/*.whl "torch==2.10.*" torch

clean:
	rm -rf build dist python/voxgemm/_lib

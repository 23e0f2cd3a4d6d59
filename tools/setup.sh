#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# setup.sh VENV: a virtual environment with the build tools, torch, the tests' and the demo's packages and this
# package (its Python files stay in the tree), and the system packages that are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}

compiles() {  # compiles FILE_TEXT FLAGS...
  printf '%s\n' "$1" | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only "${@:2}" - 2>/dev/null
}
has_compiler() { compiles '#include <thread>
#include <span>
std::jthread t; std::span<int> s;'; }
has_gtest() { compiles '#include <gtest/gtest.h>'; }
has_venv() { "$python" -c 'import ensurepip, venv'; } 2>/dev/null
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

packages=()
has_compiler || packages+=(g++)
has_gtest || packages+=(libgtest-dev)
has_venv || packages+=(python3-venv)
command -v nm >/dev/null || packages+=(binutils)
if [ ${#packages[@]} -gt 0 ]; then
  echo "setup: missing: ${packages[*]}"
  if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
  else
    echo "setup: please install: ${packages[*]} (Debian's names)" >&2
  fi
fi
has_compiler || { echo "setup: a C++20 compiler is needed, for example g++ 12" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "setup: $("$python" --version) found, Python 3.10 or newer is needed (set PYTHON)" >&2; exit 1; }
has_gtest || echo "setup: GoogleTest is missing, the C++ tests will not be built" >&2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q "scikit-build-core>=0.11"
# Only names and the console command are installed: CMake builds the library, into python/voxgemm/_lib.
pip install --no-build-isolation --config-settings=wheel.cmake=false --config-settings=editable.mode=inplace -e ".[dev,test,demo]"
for dropin in dropin/*/; do
  pip install -q --no-build-isolation --no-deps --config-settings=editable.mode=inplace -e "$dropin"
done

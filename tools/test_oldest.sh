#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test_oldest.sh VENV [PYTEST_OPTION...]: the Python tests of this tree, with the libraries it has built, under the
# oldest torch that is supported. The environment is made once; delete it to have a new one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
oldest=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install -q "scikit-build-core>=0.11"
  # Names only, as tools/setup.sh has it: the libraries are those in python/voxgemm/_lib.
  pip install -q --no-build-isolation --config-settings=wheel.cmake=false --config-settings=editable.mode=inplace \
    "torch==$oldest.*" -e ".[test,demo]" || { rm -rf "$venv"; exit 1; }
fi
found=$(PYTHONPATH=python "$venv/bin/python" -c 'import torch, voxgemm; print(torch.__version__)')
[[ $found == "$oldest".* ]] || { echo "test_oldest: torch $found in $venv, expected $oldest" >&2; exit 1; }
echo "test_oldest: torch $found"
PYTHONPATH=python exec "$venv/bin/python" -m pytest "$@"

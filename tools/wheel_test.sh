#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# wheel_test.sh WHEEL TORCH...: the Python tests against WHEEL in a new environment per torch requirement.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$1
shift
for torch in "$@"; do
  venv=build/wheel-test/${torch//[^a-z0-9.]/_}
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  echo "== $torch, $(sha256sum "$wheel")"
  "$venv/bin/python" -m pip --disable-pip-version-check install -q "$torch" "$wheel[test,demo]"
  "$venv/bin/python" - "$venv" <<'PY'
import pathlib, sys, torch, voxgemm
place = pathlib.Path(voxgemm.__file__)
assert pathlib.Path(sys.argv[1]).resolve() in place.parents, f"voxgemm is not the wheel's: {place}"
print(f"torch {torch.__version__}, voxgemm {voxgemm.__version__}, Python {sys.version.split()[0]}")
PY
  "$venv/bin/python" -m pytest tests/python
done

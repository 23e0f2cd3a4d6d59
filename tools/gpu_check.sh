#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The CUDA backend from a bare checkout on a machine with a GPU: builds for the present devices, runs the C++ and the
# Python tests, then compute-sanitizer over a short list, and prints one line for each. Exit status 0: all passed.
#   tools/gpu_check.sh [build|tests|python|sanitizers ...]     without words: all of them
# PYTHON is an interpreter with torch and pytest (default python3). Where torch's headers are too old to build the
# PyTorch layer (torch/CMakeLists.txt says which), python/voxgemm/_lib must hold one that was built elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu
python=${PYTHON:-python3}
steps=${*:-build tests python sanitizers}
failed=0
mkdir -p "$out/logs"

line() { # line NAME SECONDS COMMAND...: the command's result, the end of its log where it failed
  local name=$1 limit=$2 log="$out/logs/$1.log" status=0 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$log" 2>&1 || status=$?
  printf '%-36s %-6s %4d s  %s\n' "$name" "$([ $status = 0 ] && echo ok || echo FAILED)" $((SECONDS - start)) \
    "$(grep -hE 'tests passed|passed|PASSED|SKIPPED \]|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | grep -v 'RUN\|OK' |
      tail -3 | cut -c1-150 | tr '\n' ' ')"
  if [ $status != 0 ]; then
    grep -vE '^\[ (RUN|      OK)' "$log" | cut -c1-300 | tail -40
    failed=1
  fi
}

build() {
  line configure 120 cmake -S . -B "$out" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVOXGEMM_CUDA=ON -DVOXGEMM_LINE_INFO=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" -DVOXGEMM_LIB_DIR="$PWD/python/voxgemm/_lib"
  line build 900 cmake --build "$out" -j "$(nproc)" -- -k 0
}

tests() { line ctest 900 ctest --test-dir "$out" --output-on-failure -j "$(($(nproc) / 2))"; }

python() { line pytest 900 env PYTHONPATH="$PWD/python" "$python" -m pytest -q -x --maxfail=5; }

sanitizers() {
  local tool test
  # Short problems: one tile of every path, repeats, the extremes, an empty cloud.
  local maps='*Clouds*/shell_8:*Clouds*/repeat_1000:*Clouds*/extreme:*Clouds*/empty:Coords.WidestBox:Coords.Too*:Maps.Replay*'
  local kernels='*16__33_random_129_6:*subm3_16__16_repeat_129:*conv3s2p1_6__16_repeat_129:*inv2s2_16__33_shell_8:*subm3_1__1_line_1:Kernels.*F32:Kernels.GradBias*'
  for tool in memcheck racecheck synccheck initcheck; do
    for test in cuda_maps_test:"$maps" cuda_kernels_test:"$kernels" schedule_gpu_test:'*line*:*empty*:*repeat*'; do
      line "$tool-${test%%:*}" 600 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$out/tests/${test%%:*}" --gtest_brief=1 --gtest_filter="${test#*:}"
    done
  done
}

for step in $steps; do "$step"; done
exit $failed

#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The CUDA backend from a bare checkout on a machine with a GPU: builds for the present devices, runs the C++ and the
# Python tests, then compute-sanitizer over a short list, and prints one line for each. Exit status 0: all passed.
#   tools/gpu_check.sh [build|tests|python|sanitizers ...]     without words: all of them
# BUILD is the folder of the build (default build/gpu), PYTHON an interpreter with torch and pytest (default python3).
# Where torch's headers are too old to build the PyTorch layer (torch/CMakeLists.txt says which), python/voxgemm/_lib
# must hold one that was built elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build/gpu}
python=${PYTHON:-python3}
steps=${*:-build tests python sanitizers}
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc itself gives what OMP_NUM_THREADS says
logs=build/gpu_check
failed=0
mkdir -p "$logs"

line() { # line NAME SECONDS COMMAND...: the command's result, the end of its log where it failed
  local name=$1 limit=$2 log="$logs/$1.log" status=0 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$log" 2>&1 || status=$?
  printf '%-36s %-6s %4d s  %s\n' "$name" "$([ $status = 0 ] && echo ok || echo FAILED)" $((SECONDS - start)) \
    "$(grep -hE 'tests passed|passed|PASSED|SKIPPED \]|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | grep -v 'RUN\|OK' |
      tail -3 | cut -c1-150 | tr '\n' ' ')"
  if [ $status != 0 ]; then
    grep -vE '^\[ (RUN|      OK)' "$log" | cut -c1-300 | tail -40
    return 1
  fi
}
export -f line
export build logs

build() {
  line configure 120 cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVOXGEMM_CUDA=ON \
    -DVOXGEMM_LINE_INFO=ON -DPython_EXECUTABLE="$(command -v "$python")" -DVOXGEMM_LIB_DIR="$PWD/python/voxgemm/_lib" &&
    line build 900 cmake --build "$build" -j "$cores" -- -k 0
}

tests() { line ctest 900 ctest --test-dir "$build" --output-on-failure -j "$(($cores / 2))"; }

# A process for each file: torch alone takes seconds to load, and one broken file takes no others along.
python() {
  local list="$logs/python.txt"
  printf '%s\n' tests/python/test_*.py tests/dropin/test_*.py >"$list"
  export PYTHONPATH="$PWD/python:$PWD/dropin/flex_gemm:$PWD/dropin/warpconvnet${PYTHONPATH:+:$PYTHONPATH}"
  export OMP_NUM_THREADS=1 python
  # shellcheck disable=SC2016
  xargs -P "$(($cores / 2))" -I{} bash -c \
    'line "$(basename {} .py)" 900 bash -c "$python -m pytest -q -p no:cacheprovider --tb=short --maxfail=20 {} || [ \$? = 5 ]"' <"$list"
}

sanitizers() {
  # Short problems: one tile of every path, repeats, the extremes, an empty cloud. A shard of the kernels' is
  # one pass and dtype, since most of the time goes into instrumenting each kernel in each process.
  local maps='*Clouds*/shell_8:*Clouds*/repeat_1000:*Clouds*/extreme:*Clouds*/empty:Coords.WidestBox:Coords.Too*:Maps.Replay*'
  local kernels='List/ShortLayers*:Kernels.GradBias*'
  local operators='Operators.*:List/*/100:List/*/64_between_8:List/*/40_between_1'
  local list="$logs/sanitizers.txt" tool shard
  # initcheck of the operators takes longest, 5 minutes a shard.
  for tool in initcheck racecheck memcheck synccheck; do
    for shard in {0..11}; do echo "$tool cuda_operators_test 12 $shard $operators"; done
    for shard in {0..11}; do echo "$tool cuda_kernels_test 12 $shard $kernels"; done
    echo "$tool cuda_maps_test 1 0 $maps"
    echo "$tool schedule_gpu_test 1 0 *line*:*empty*:*repeat*"
  done >"$list"
  # shellcheck disable=SC2016
  xargs -P "$cores" -n 5 bash -c 'GTEST_TOTAL_SHARDS=$2 GTEST_SHARD_INDEX=$3 line "$0-${1%_test}-$3" 600 compute-sanitizer \
    --tool "$0" --error-exitcode 9 --print-limit 4 "$build/tests/$1" --gtest_brief=1 --gtest_filter="$4"' <"$list"
}

for step in $steps; do "$step" || failed=1; done
exit $failed

#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The CUDA backend from a bare checkout on a machine with a GPU: builds for the present device, runs the tests of
# tests/cuda, then compute-sanitizer over a short list, and prints one line for each. Exit status 0: all passed.
#   tools/gpu_check.sh [--build-only [ARCH]]      ARCH: as in sm_ARCH, e.g. 90a, 80
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu-check
jobs=$(nproc)
mkdir -p "$out/objects"

arch=${2:-}
if [ -z "$arch" ]; then
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  # Hopper's own instructions need the name with the a.
  [ "$arch" = 90 ] && arch=90a
fi
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}

cmake -S . -B "$out/cpu" -DVOXGEMM_TORCH=OFF -DVOXGEMM_TESTS=OFF -DVOXGEMM_CUDA=OFF -DCMAKE_BUILD_TYPE=Release >"$out/cmake.log"
cmake --build "$out/cpu" --target voxgemm -j "$jobs" >>"$out/cmake.log"
includes="-Isrc -Iinclude -Itests -I$cuda/include"
export includes arch out
compile() {
  object="$out/objects/$(echo "${1%.*}" | tr / _).o"
  case $1 in
    tests/*) g++ -std=c++20 -O1 $includes -c "$1" -o "$object" ;;
    *) nvcc -std=c++20 -O3 -lineinfo $includes -Xcompiler=-Wall,-Wextra "-gencode=arch=compute_$arch,code=sm_$arch" \
      -Xptxas=-v -c "$1" -o "$object" >"$object.log" 2>&1 || { cat "$object.log"; exit 1; } ;;
  esac
}
export -f compile
find src/cuda tests/cuda -name '*.cu' -o -path 'src/cuda/*.cpp' -o -name '*_test.cpp' |
  xargs -P "$jobs" -I{} bash -c 'compile {}'
spilled=$(grep -l '[1-9][0-9]* bytes spill' "$out"/objects/*.log || true)
for test in tests/cuda/*_test.cpp; do
  name=$(basename "$test" .cpp)
  g++ -o "$out/$name" "$out/objects/tests_cuda_$name.o" "$out"/objects/src_*.o "$out/cpu/src/libvoxgemm.a" \
    -lgtest -lgtest_main -L"$cuda/lib64" -lcudart_static -lpthread -ldl -lrt
done
[ "${1:-}" = --build-only ] && exit

failed=0
line() { # line NAME COMMAND...: the command's result, its log where it failed
  local name=$1 log="$out/$1.log" status=0 start=$SECONDS
  shift
  timeout 600 "$@" >"$log" 2>&1 || status=$?
  printf '%-24s %-6s %4d s  %s\n' "$name" "$([ $status = 0 ] && echo ok || echo FAILED)" $((SECONDS - start)) \
    "$(grep -hE 'PASSED|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tr '\n' ' ')"
  if [ $status != 0 ]; then
    grep -vE '^\[ (RUN|      OK)' "$log" | cut -c1-300 | tail -40
    failed=1
  fi
}
if [ -n "$spilled" ]; then
  echo "register spills in: $spilled"
  failed=1
fi
for test in maps_test kernels_test implicit_gemm_sm90_test; do line $test "$out/$test" --gtest_brief=1; done
maps='*Clouds*/shell_8:*Clouds*/repeat_1000:*Clouds*/extreme:*Clouds*/empty:Coords.WidestBox:Coords.Too*:Maps.Replay*'
kernels='*16__33_random_129_6:*subm3_16__16_repeat_129:*conv3s2p1_6__16_repeat_129:*inv2s2_16__33_shell_8:Kernels.*F32:Kernels.GradBias*'
for tool in memcheck racecheck synccheck initcheck; do
  check="compute-sanitizer --tool $tool --error-exitcode 9"
  line $tool-maps $check "$out/maps_test" --gtest_brief=1 --gtest_filter="$maps"
  line $tool-sm90 $check "$out/implicit_gemm_sm90_test" --gtest_brief=1 --gtest_filter='*16__16_line_1:*64__64_random_129_6:*8__24_shell_12'
  line $tool-kernels $check "$out/kernels_test" --gtest_brief=1 --gtest_filter="$kernels"
done
exit $failed

// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set; isa.h has the flags.

#include "cpu/simd/isa.h"

#include "cpu/simd/amx.h"
#include "cpu/simd/dot_bf16.h"
#include "cpu/simd/outer.h"
#include "cpu/simd/rows.h"

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

// GFLOP/s of one core at 64 channels, of machines that were measured.
constexpr double gflops = vector_bytes == 64 ? 200 : vector_bytes == 32 ? 84 : 23;

constexpr size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// Bytes of copies of `row_bytes` each.
constexpr size_t copies_bytes(int row_bytes) {
  return static_cast<size_t>(copied_rows(row_bytes)) * row_bytes;
}

#if !defined(__AVX512BF16__)

template <class T>
constexpr Engine engine(Dtype dtype) {
  return {.isa = isa,
          .dtype = dtype,
          .panel_cols = lanes,
          .block_cols = panel_vectors * lanes,
          .gflops = gflops,
          .supported = supported,
          .begin = [] {},
          .end = [] {},
          .packed_bytes = [](int k, int n) { return packed_size(k, n); },
          .scratch_bytes =
              [](int k, int n) {
                return larger(OuterCopies(k, n, nullptr).bytes(),
                              copies_bytes(round_up(k, lanes) * 4));
              },
          .pack = [](const PackArgs& a) { pack_panels<T, WideUnit>(a, a.k); },
          .multiply = multiply<T>,
          .outer = outer<T>,
          .store = store_rows<T>,
          .compact = compact};
}

#elif !defined(__AMX_TILE__) && !defined(__AMXTILE__)

constexpr Engine dot_engine = {
    .isa = isa,
    .dtype = Dtype::bf16,
    .panel_cols = lanes,
    .block_cols = panel_vectors * lanes,
    .gflops = 2 * gflops,
    .supported = supported,
    .begin = [] {},
    .end = [] {},
    .packed_bytes = [](int k, int n) { return packed_size((k + 1) / 2, n); },
    .scratch_bytes =
        [](int k, int n) {
          return larger(OuterCopies(k, n, nullptr).bytes(), copies_bytes(round_up(k, 2) * 2));
        },
    .pack = [](const PackArgs& a) { pack_panels<Bf16, PairUnit>(a, (a.k + 1) / 2); },
    .multiply = [](const MultiplyArgs& a) { multiply_dot(a, (a.k + 1) / 2); },
    .outer = outer_dot,
    .store = store_rows<Bf16>,
    .compact = compact};

#else

template <class T>
constexpr Engine tile_engine(Dtype dtype, bool (*runs)()) {
  return {.isa = isa,
          .dtype = dtype,
          .panel_cols = lanes,
          .block_cols = panel_vectors * lanes,
          .gflops = 6 * gflops,
          .supported = runs,
          .begin = begin_tiles,
          .end = end_tiles,
          .packed_bytes = [](int k, int n) { return packed_size(height_of(k), n); },
          .scratch_bytes =
              [](int k, int n) {
                const size_t outer = k * n <= narrow_outer ? OuterCopies(k, n, nullptr).bytes()
                                                           : OuterTiles(k, n, nullptr).bytes();
                return larger(outer, copies_bytes(tile_row_bytes(height_of(k))));
              },
          .pack = [](const PackArgs& a) { pack_panels<T, PairUnit>(a, height_of(a.k)); },
          .multiply = multiply_amx<T>,
          .outer = outer_amx<T>,
          .store = store_rows<T>,
          .compact = compact};
}

#endif

}  // namespace

#if defined(__AMX_TILE__) || defined(__AMXTILE__)
constinit const Engine bf16 = tile_engine<Bf16>(Dtype::bf16, supports_amx);
constinit const Engine f16 = tile_engine<F16>(Dtype::f16, supports_amx_fp16);
#elif defined(__AVX512BF16__)
constinit const Engine bf16 = dot_engine;
#else
constinit const Engine f32 = engine<float>(Dtype::f32);
constinit const Engine bf16 = engine<Bf16>(Dtype::bf16);
constinit const Engine f16 = engine<F16>(Dtype::f16);
#endif

}  // namespace voxgemm::cpu::VOXGEMM_ISA

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "voxgemm/types.h"

namespace voxgemm::cpu {

// The arithmetic of one instruction set for one dtype: with row_engine.h the only code that is
// compiled several times. The drivers (convolution.cpp, weight_gradient.cpp) walk schedules, share
// work among threads and own all memory; an engine multiplies what it is given. All arithmetic of
// one output element happens in one fixed order, whatever rows and columns stand beside it, so
// results do not depend on tiles' neighbours or threads.
//
// The packed form of W [k, n] (k rows of the reduction, n columns) is the engine's own: panels of
// whole vectors, k padded with zeros to the unit of its instructions.

struct PackArgs {
  const void* weights;  // element (r, c) at weights + r * k_stride + c * n_stride elements
  int64_t k_stride;
  int64_t n_stride;
  int k;
  int n;
  void* packed;  // packed_bytes(k, n)
};

struct MultiplyArgs {
  const void* x;  // dtype, row r at x + r * x_stride elements
  int64_t x_stride;
  int k;
  int n;
  const void* packed;       // of W [k, n]
  const int32_t* in_rows;   // [pairs]
  const int32_t* acc_rows;  // [pairs], distinct
  int pairs;
  float* acc;  // row r at acc + r * acc_stride; acc_stride >= n rounded up to panel_cols
  int64_t acc_stride;
  void* scratch;       // scratch_bytes(k, n), 64-byte aligned, of this worker
  bool begun = false;  // between begin() and end() of this thread
};

struct OuterArgs {
  const void* x;  // [.., k]
  int64_t x_stride;
  const void* dy;  // [.., n]
  int64_t dy_stride;
  const int32_t* x_rows;   // [pairs]
  const int32_t* dy_rows;  // [pairs]
  int pairs;
  int k;
  int n;
  float* dw;  // [k, n], row stride dw_stride
  int64_t dw_stride;
  void* scratch;  // as for multiply
  bool begun = false;
};

struct StoreArgs {
  const float* acc = nullptr;  // [rows, n], row r at acc + r * acc_stride
  int64_t acc_stride = 0;
  const void* bias = nullptr;      // [n] of dtype, or null
  const void* residual = nullptr;  // like y, or null
  int64_t residual_stride = 0;
  bool relu = false;
  void* y = nullptr;  // [rows, n] of dtype, row r at y + r * y_stride elements
  int64_t y_stride = 0;
  int64_t rows = 0;
  int n = 0;
};

struct Engine {
  const char* isa;  // "v2", "v3", "v4", "v4bf16", "amx", "portable"
  Dtype dtype;
  // Rows of acc are padded to a multiple of panel_cols, which multiply may write past n. Column
  // blocks that a driver cuts should be block_cols wide or a multiple: narrower ones leave
  // registers unused.
  int panel_cols;
  int block_cols;
  // GFLOP/s of `multiply` on one core at 64 channels, for the cost model.
  double gflops;
  bool (*supported)();  // on the CPU that runs this, and worth its use there
  // Sets up and gives back what the instructions need of a thread (AMX: tile registers). A thread
  // that calls both around many calls of multiply and outer says so in their `begun`; each sets up
  // for itself otherwise. In between it calls nothing else that might use the same, such as another
  // library's matrix product.
  void (*begin)();
  void (*end)();
  size_t (*packed_bytes)(int k, int n);
  size_t (*scratch_bytes)(int k, int n);
  void (*pack)(const PackArgs&);
  // acc[acc_rows[i]] += x[in_rows[i]] W for every i.
  void (*multiply)(const MultiplyArgs&);
  // dw += sum over i, in order, of x[x_rows[i]]^T dy[dy_rows[i]].
  void (*outer)(const OuterArgs&);
  // y = acc + bias, rounded once; nothing past the columns of y.
  void (*store)(const StoreArgs&);
  // Writes the entries of indices [n] that are >= 0 to in_rows and their positions + first_position
  // to positions; returns their number. Both outputs have room for n + 16. Fetches the cache lines
  // of the n indices behind these: the same tap of the next tile, or the next tap.
  int (*compact)(
      const int32_t* indices, int n, int32_t first_position, int32_t* in_rows, int32_t* positions);
};

// Engines of this build, best first.
std::span<const Engine* const> engines();

}  // namespace voxgemm::cpu

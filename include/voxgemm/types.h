// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#define VOXGEMM_EXPORT __attribute__((visibility("default")))

namespace voxgemm {

// Element types of matrices. i32 and i64 hold coordinates, row numbers and counts.
enum class Dtype { f16, bf16, f32, f64, i32, i64 };

constexpr size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16:
    case Dtype::bf16:
      return 2;
    case Dtype::f32:
    case Dtype::i32:
      return 4;
    case Dtype::f64:
    case Dtype::i64:
      return 8;
  }
  return 0;
}

// How products of f32 operands are made on tensor cores; sums are f32 in all of them. The other
// dtypes know one way only, and the CPU treats every mode as ieee, which is at least as exact.
enum class Precision {
  ieee,    // f32 products
  tf32,    // operands rounded to 11 significant bits
  bf16x3,  // operands split in two bf16 each, three products: about 16 bits
  bf16x6,  // in three bf16 each, six products: about 24 bits, as ieee
};

enum class DeviceKind { cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

// A view of `rows` x `cols` elements; element (r, c) is at `data + (r * stride + c) *
// size_of(dtype)`, which is aligned to its size. The stride of a single row may be anything. It
// owns nothing. A function that only reads a matrix says so in its comment.
struct MatrixRef {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  Dtype dtype = Dtype::f32;
  Device device = {};

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  template <class T>
  T* row(int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }
};

// A matrix that shares the ownership of its memory.
struct Matrix : MatrixRef {
  std::shared_ptr<void> storage = {};
  bool empty() const { return rows == 0 || cols == 0; }
};

// The weights of a convolution: element (tap, in, out) is at
// `data + (tap * tap_stride + in * in_stride + out * out_stride) * size_of(dtype)`, so every layout
// in use ([c_out, Kx, Ky, Kz, c_in] and [taps, c_in, c_out] among them) is a view, and nothing is
// transposed.
struct WeightsRef {
  void* data = nullptr;
  int taps = 0;
  int c_in = 0;
  int c_out = 0;
  int64_t tap_stride = 0;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
  Dtype dtype = Dtype::f32;
  Device device = {};
};

// What is computed, for a map with `in(out row, tap)` and weights W[tap] of shape [c_in, c_out]:
//   forward      y[o]   = bias + sum over taps of x[in(o, t)] W[t]
//   grad_input   dx[i]  = sum over pairs (i, o, t) of dy[o] W[t]^T
//   grad_weight  dW[t]  = sum over pairs (i, o, t) of x[i]^T dy[o]
enum class Pass { forward, grad_input, grad_weight };

// The public names of the search spaces; each is a way to build a schedule (schedule.h).
enum class Algorithm {
  explicit_gemm,
  implicit_gemm,
  implicit_gemm_splitk,
  masked_implicit_gemm,
  masked_implicit_gemm_splitk,
};
constexpr int algorithm_count = 5;

// Names as they stand in problem strings, kernel names and messages.
VOXGEMM_EXPORT std::string_view name(Dtype dtype);
VOXGEMM_EXPORT std::string_view name(Precision precision);
VOXGEMM_EXPORT std::string_view name(Pass pass);
VOXGEMM_EXPORT std::string_view name(Algorithm algorithm);

}  // namespace voxgemm

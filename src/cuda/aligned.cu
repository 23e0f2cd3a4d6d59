// SPDX-License-Identifier: Apache-2.0
#include "cuda/aligned.h"

#include "conv/passes.h"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

// Elements of one size, whatever the strides; channels that `from` has not get zeros.
template <class T>
void copy_elements(const Context& ctx, const WeightsRef& from, const WeightsRef& to) {
  for_each(ctx, int64_t{to.taps} * to.c_out * to.c_in, [=] __device__(int64_t i) {
    const int64_t in = i % to.c_in;
    const int64_t out = i / to.c_in % to.c_out;
    const int64_t tap = i / to.c_in / to.c_out;
    const auto element = [&](const WeightsRef& w) -> T& {
      return static_cast<T*>(w.data)[tap * w.tap_stride + in * w.in_stride + out * w.out_stride];
    };
    element(to) = in < from.c_in ? element(from) : T(0);
  });
}
void copy_weights(const Context& ctx, const WeightsRef& from, const WeightsRef& to) {
  const size_t size = size_of(to.dtype);
  const auto copy = size == 2   ? copy_elements<uint16_t>
                    : size == 4 ? copy_elements<uint32_t>
                                : copy_elements<uint64_t>;
  copy(ctx, from, to);
}

// Elements of 16 bytes.
int unit_of(const WeightsRef& w) { return static_cast<int>(16 / size_of(w.dtype)); }
// Input channels up to a whole such piece.
int padded_channels(const WeightsRef& w) {
  return static_cast<int>(ceil_div(w.c_in, unit_of(w))) * unit_of(w);
}

}  // namespace

bool is_aligned(const WeightsRef& w) {
  const int unit = unit_of(w);
  return reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.c_in % unit == 0 &&
         w.tap_stride % unit == 0 && w.out_stride % unit == 0 && w.in_stride == 1;
}

WeightsRef one_tap(const MatrixRef& m) {
  return {.data = m.data,
          .taps = 1,
          .c_in = static_cast<int>(m.cols),
          .c_out = static_cast<int>(m.rows),
          .in_stride = 1,
          .out_stride = m.rows > 1 ? m.stride : 0,
          .dtype = m.dtype,
          .device = m.device};
}

bool is_wide(const MatrixRef& m) { return is_aligned(one_tap(m)); }

Matrix aligned_output(const Context& ctx, const MatrixRef& y) {
  if (is_wide(y)) return {y};
  Matrix padded = make_matrix(ctx, y.rows, padded_channels(one_tap(y)), y.dtype);
  padded.cols = y.cols;
  return padded;
}

Matrix aligned_input(const Context& ctx, const MatrixRef& x) {
  Matrix result = aligned_output(ctx, x);
  if (result.storage == nullptr) return result;
  MatrixRef padded = result;
  padded.cols = padded.stride;
  copy_weights(ctx, one_tap(x), one_tap(padded));
  return result;
}

void write_back(const Context& ctx, const Matrix& from, const MatrixRef& y) {
  if (from.storage != nullptr) copy_weights(ctx, one_tap(from), one_tap(y));
}

AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w) {
  if (w.in_stride != 1 && w.out_stride == 1) {
    const AlignedWeights turned = aligned_weights(ctx, seen_transposed(w));
    return {seen_transposed(turned), turned.memory};
  }
  if (is_aligned(w)) return {w};
  WeightsRef padded = w;
  padded.c_in = padded_channels(w);
  padded.tap_stride = int64_t{padded.c_in} * w.c_out;
  padded.in_stride = 1;
  padded.out_stride = padded.c_in;
  std::shared_ptr<void> memory = ctx.allocate(w.taps * padded.tap_stride * size_of(w.dtype));
  padded.data = memory.get();
  copy_weights(ctx, w, padded);
  padded.c_in = w.c_in;
  return {padded, std::move(memory)};
}

// A copy of nothing: all is padding.
void fill_zero(const Context& ctx, const WeightsRef& w) { copy_weights(ctx, {}, w); }

}  // namespace voxgemm::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/aligned.h"

#include "conv/passes.h"
#include "cuda/launch.cuh"

namespace voxgemm::cuda {
namespace {

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

// Elements of 16 bytes.
int unit_of(const WeightsRef& w) { return static_cast<int>(16 / size_of(w.dtype)); }

// Whether the input channels are the contiguous axis, in whole pieces of 16 bytes.
bool is_aligned(const WeightsRef& w) {
  const int unit = unit_of(w);
  return reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.c_in % unit == 0 &&
         w.tap_stride % unit == 0 && w.out_stride % unit == 0 && w.in_stride == 1;
}

// Memory for weights of this shape, contiguous and with padded input channels.
AlignedWeights make_padded(const Context& ctx, WeightsRef w) {
  w.c_in = static_cast<int>(ceil_div(w.c_in, unit_of(w))) * unit_of(w);
  w.tap_stride = int64_t{w.c_in} * w.c_out;
  w.in_stride = 1;
  w.out_stride = w.c_in;
  std::shared_ptr<void> memory = ctx.allocate(w.taps * w.tap_stride * size_of(w.dtype));
  w.data = memory.get();
  return {w, std::move(memory)};
}

}  // namespace

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

AlignedMatrix aligned_output(const Context& ctx, const MatrixRef& y) {
  AlignedMatrix result{y, nullptr};
  if (is_wide(y)) return result;
  const AlignedWeights room = make_padded(ctx, one_tap(y));
  result.matrix.data = room.weights.data;
  result.matrix.stride = room.weights.out_stride;
  result.memory = room.memory;
  return result;
}

AlignedMatrix aligned_input(const Context& ctx, const MatrixRef& x) {
  AlignedMatrix result = aligned_output(ctx, x);
  if (!result.is_copy()) return result;
  MatrixRef padded = result.matrix;
  padded.cols = padded.stride;
  copy_weights(ctx, one_tap(x), one_tap(padded));
  return result;
}

void write_back(const Context& ctx, const AlignedMatrix& from, const MatrixRef& y) {
  if (from.is_copy()) copy_weights(ctx, one_tap(from.matrix), one_tap(y));
}

AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w) {
  if (w.in_stride != 1 && w.out_stride == 1) {
    AlignedWeights turned = aligned_weights(ctx, seen_transposed(w));
    turned.weights = seen_transposed(turned.weights);
    return turned;
  }
  if (is_aligned(w)) return {w, nullptr};
  AlignedWeights result = make_padded(ctx, w);
  copy_weights(ctx, w, result.weights);
  result.weights.c_in = w.c_in;
  return result;
}

void copy_weights(const Context& ctx, const WeightsRef& from, const WeightsRef& to) {
  dispatch_size(to.dtype, [&]<class T>(T) { copy_elements<T>(ctx, from, to); });
}

// A copy of nothing: all is padding.
void fill_zero(const Context& ctx, const WeightsRef& w) { copy_weights(ctx, {}, w); }

}  // namespace voxgemm::cuda

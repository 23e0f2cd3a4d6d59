// SPDX-License-Identifier: Apache-2.0
#include "cuda/aligned.h"

#include "conv/passes.h"
#include "cuda/launch.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

// An array of three axes.
struct Array {
  void* data;
  int64_t sizes[3];
  int64_t strides[3];
};
Array array_of(const MatrixRef& m) {
  return {m.data, {1, m.rows, m.cols}, {0, m.rows > 1 ? m.stride : 0, 1}};
}
// Taps and both channels, the input's as the last.
Array array_of(const WeightsRef& w, bool in_last) {
  if (!in_last) {
    return {w.data, {w.taps, w.c_in, w.c_out}, {w.tap_stride, w.in_stride, w.out_stride}};
  }
  return {w.data, {w.taps, w.c_out, w.c_in}, {w.tap_stride, w.out_stride, w.in_stride}};
}

// to[a][b][c] = from[a][b][c] for c below from's size, else 0.
template <class T>
__global__ void copy_padded(Array from, Array to) {
  const int64_t count = to.sizes[0] * to.sizes[1] * to.sizes[2];
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t c = i % to.sizes[2];
    const int64_t b = i / to.sizes[2] % to.sizes[1];
    const int64_t a = i / to.sizes[2] / to.sizes[1];
    const auto element = [&](const Array& of) -> T& {
      return static_cast<T*>(of.data)[a * of.strides[0] + b * of.strides[1] + c * of.strides[2]];
    };
    element(to) = c < from.sizes[2] ? element(from) : T(0);
  }
}

void copy_array(const Context& ctx, Dtype dtype, const Array& from, const Array& to) {
  const DeviceGuard guard(ctx.device);
  dispatch_size(dtype, [&]<class T>(T) {
    launch(ctx, over(ctx, to.sizes[0] * to.sizes[1] * to.sizes[2]), copy_padded<T>, from, to);
  });
}

bool is_aligned(const Array& array, Dtype dtype) {
  const auto unit = static_cast<int64_t>(16 / size_of(dtype));
  return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && array.sizes[2] % unit == 0 &&
         array.strides[0] % unit == 0 && array.strides[1] % unit == 0 && array.strides[2] == 1;
}

// Memory for an array of these sizes, the last one padded; `array` becomes what lies there.
std::shared_ptr<void> make_room(const Context& ctx, Dtype dtype, Array* array) {
  int64_t(&sizes)[3] = array->sizes;
  const auto unit = static_cast<int64_t>(16 / size_of(dtype));
  sizes[2] = ceil_div(sizes[2], unit) * unit;
  array->strides[0] = sizes[1] * sizes[2];
  array->strides[1] = sizes[2];
  array->strides[2] = 1;
  std::shared_ptr<void> memory = ctx.allocate(sizes[0] * array->strides[0] * size_of(dtype));
  array->data = memory.get();
  return memory;
}

}  // namespace

bool is_wide(const MatrixRef& m) { return is_aligned(array_of(m), m.dtype); }

AlignedMatrix aligned_output(const Context& ctx, const MatrixRef& y) {
  AlignedMatrix result{y, nullptr};
  if (is_wide(y)) return result;
  Array room = array_of(y);
  result.memory = make_room(ctx, y.dtype, &room);
  result.matrix.data = room.data;
  result.matrix.stride = room.strides[1];
  return result;
}

AlignedMatrix aligned_input(const Context& ctx, const MatrixRef& x) {
  AlignedMatrix result = aligned_output(ctx, x);
  if (!result.is_copy()) return result;
  MatrixRef padded = result.matrix;
  padded.cols = padded.stride;
  copy_array(ctx, x.dtype, array_of(x), array_of(padded));
  return result;
}

void write_back(const Context& ctx, const AlignedMatrix& from, const MatrixRef& y) {
  if (from.is_copy()) copy_array(ctx, y.dtype, array_of(from.matrix), array_of(y));
}

AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w) {
  const bool in_last = w.in_stride == 1 || w.out_stride != 1;
  const Array from = array_of(w, in_last);
  if (is_aligned(from, w.dtype)) return {w, nullptr};
  Array to = from;
  AlignedWeights result{w, make_room(ctx, w.dtype, &to)};
  copy_array(ctx, w.dtype, from, to);
  result.weights.data = to.data;
  result.weights.tap_stride = to.strides[0];
  (in_last ? result.weights.out_stride : result.weights.in_stride) = to.strides[1];
  (in_last ? result.weights.in_stride : result.weights.out_stride) = 1;
  return result;
}

void copy_weights(const Context& ctx, const WeightsRef& from, const WeightsRef& to) {
  copy_array(ctx, from.dtype, array_of(from, false), array_of(to, false));
}

void fill_zero(const Context& ctx, const WeightsRef& w) {
  // A copy of nothing: all is padding.
  copy_array(ctx, w.dtype, {}, array_of(w, false));
}

}  // namespace voxgemm::cuda

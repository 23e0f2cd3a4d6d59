// SPDX-License-Identifier: Apache-2.0
#include "cuda/aligned.h"

#include "conv/passes.h"
#include "cuda/launch.cuh"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

bool at_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t per_16_bytes(Dtype dtype) { return static_cast<int64_t>(16 / size_of(dtype)); }

// An array of three axes, the last one contiguous in the copy.
struct Axes {
  int64_t sizes[3];
  int64_t strides[3];
};

// to[a][b][c] = from[a][b][c] for c below from's size, else 0.
template <class T>
__global__ void copy_padded(const T* from, Axes source, T* to, Axes target) {
  const int64_t count = target.sizes[0] * target.sizes[1] * target.sizes[2];
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t c = i % target.sizes[2];
    const int64_t b = i / target.sizes[2] % target.sizes[1];
    const int64_t a = i / target.sizes[2] / target.sizes[1];
    to[a * target.strides[0] + b * target.strides[1] + c * target.strides[2]] =
        c < source.sizes[2]
            ? from[a * source.strides[0] + b * source.strides[1] + c * source.strides[2]]
            : T(0);
  }
}

struct Side {
  void* data;
  Axes axes;
};
void copy_axes(const Context& ctx, Dtype dtype, const Side& from, const Side& to) {
  const DeviceGuard guard(ctx.device);
  dispatch_size(dtype, [&]<class T>(T) {
    launch(ctx, over(ctx, to.axes.sizes[0] * to.axes.sizes[1] * to.axes.sizes[2]), copy_padded<T>,
           static_cast<const T*>(from.data), from.axes, static_cast<T*>(to.data), to.axes);
  });
}

Side side_of(const MatrixRef& m, int64_t cols) {
  return {m.data, {{1, m.rows, cols}, {0, m.stride, 1}}};
}

bool is_aligned(const MatrixRef& m) {
  const int64_t unit = per_16_bytes(m.dtype);
  return at_16(m.data) && m.cols % unit == 0 && (m.stride % unit == 0 || m.rows <= 1);
}

AlignedMatrix room_for(const Context& ctx, const MatrixRef& m) {
  AlignedMatrix result{m, nullptr};
  result.matrix.stride = round_up(m.cols, per_16_bytes(m.dtype));
  result.memory = ctx.allocate(m.rows * result.matrix.stride * size_of(m.dtype));
  result.matrix.data = result.memory.get();
  return result;
}

bool is_aligned(const WeightsRef& w) {
  const int64_t unit = per_16_bytes(w.dtype);
  const bool in_contiguous = w.in_stride == 1;
  if (!at_16(w.data) || (!in_contiguous && w.out_stride != 1)) return false;
  const int64_t other = in_contiguous ? w.out_stride : w.in_stride;
  return (in_contiguous ? w.c_in : w.c_out) % unit == 0 && other % unit == 0 &&
         w.tap_stride % unit == 0;
}

}  // namespace

AlignedMatrix aligned_input(const Context& ctx, const MatrixRef& x) {
  if (is_aligned(x)) return {x, nullptr};
  AlignedMatrix copied = room_for(ctx, x);
  copy_axes(ctx, x.dtype, side_of(x, x.cols), side_of(copied.matrix, copied.matrix.stride));
  return copied;
}

AlignedMatrix aligned_output(const Context& ctx, const MatrixRef& y) {
  return is_aligned(y) ? AlignedMatrix{y, nullptr} : room_for(ctx, y);
}

void write_back(const Context& ctx, const AlignedMatrix& from, const MatrixRef& y) {
  if (!from.is_copy()) return;
  copy_axes(ctx, y.dtype, side_of(from.matrix, y.cols), side_of(y, y.cols));
}

AlignedWeights aligned_weights(const Context& ctx, const WeightsRef& w) {
  if (is_aligned(w)) return {w, nullptr};
  AlignedWeights result{w, nullptr};
  const bool in_contiguous = w.in_stride == 1 || w.out_stride != 1;
  const int64_t contiguous = in_contiguous ? w.c_in : w.c_out;
  const int64_t other = in_contiguous ? w.c_out : w.c_in;
  const int64_t padded = round_up(contiguous, per_16_bytes(w.dtype));
  result.memory = ctx.allocate(w.taps * other * padded * size_of(w.dtype));
  result.weights.data = result.memory.get();
  result.weights.tap_stride = other * padded;
  result.weights.in_stride = in_contiguous ? 1 : padded;
  result.weights.out_stride = in_contiguous ? padded : 1;
  const Axes from = {{w.taps, other, contiguous},
                     {w.tap_stride, in_contiguous ? w.out_stride : w.in_stride,
                      in_contiguous ? w.in_stride : w.out_stride}};
  const Axes to = {{w.taps, other, padded}, {other * padded, padded, 1}};
  copy_axes(ctx, w.dtype, {w.data, from}, {result.weights.data, to});
  return result;
}

void copy_weights(const Context& ctx, const WeightsRef& from, const WeightsRef& to) {
  const auto axes = [](const WeightsRef& w) -> Axes {
    return {{w.taps, w.c_in, w.c_out}, {w.tap_stride, w.in_stride, w.out_stride}};
  };
  copy_axes(ctx, from.dtype, {from.data, axes(from)}, {to.data, axes(to)});
}

void fill_zero(const Context& ctx, const WeightsRef& w) {
  // A copy of nothing: all is padding.
  const Axes from = {{w.taps, w.c_in, 0}, {0, 0, 0}};
  const Axes to = {{w.taps, w.c_in, w.c_out}, {w.tap_stride, w.in_stride, w.out_stride}};
  copy_axes(ctx, w.dtype, {nullptr, from}, {w.data, to});
}

}  // namespace voxgemm::cuda

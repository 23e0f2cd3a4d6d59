// SPDX-License-Identifier: Apache-2.0
#include "conv/curve.h"

#include <algorithm>

#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/sorting.h"
#include "cuda/voxel_index.cuh"

namespace voxgemm::cuda {
namespace {

template <class Key>
__global__ void write_codes(Coords coords, CurveRule rule, Key* codes) {
  for (int64_t r = thread_index(); r < coords.rows; r += thread_count()) {
    const int4 c = coords[r];
    const int32_t voxel[4] = {c.x, c.y, c.z, c.w};
    codes[r] = static_cast<Key>(curve_code(rule, voxel));
  }
}

template <class Key>
__global__ void write_coords(const Key* codes, CurveRule rule, int64_t rows, int32_t* coords) {
  for (int64_t r = thread_index(); r < rows; r += thread_count()) {
    curve_voxel(rule, codes[r], coords + 4 * r);
  }
}

__global__ void number_rows(uint32_t* rows, int64_t count) {
  for (int64_t r = thread_index(); r < count; r += thread_count()) {
    rows[r] = static_cast<uint32_t>(r);
  }
}

__global__ void write_permutations(const uint32_t* rows,
                                   int64_t count,
                                   int64_t* permutation,
                                   int64_t* inverse) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    permutation[i] = rows[i];
    inverse[rows[i]] = i;
  }
}

}  // namespace

void curve_encode(const Context& ctx,
                  const MatrixRef& coords,
                  const CurveOptions& options,
                  const MatrixRef& codes) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    launch(ctx, over(ctx, coords.rows), write_codes<Key>, Coords(coords), CurveRule(options),
           codes.as<Key>());
  });
}

void curve_decode(const Context& ctx,
                  const MatrixRef& codes,
                  const CurveOptions& options,
                  const MatrixRef& coords) {
  const DeviceGuard guard(ctx.device);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    launch(ctx, over(ctx, codes.rows), write_coords<Key>, codes.as<Key>(), CurveRule(options),
           codes.rows, coords.as<int32_t>());
  });
}

SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes) {
  const DeviceGuard guard(ctx.device);
  const int64_t n = codes.rows;
  SortedCodes result;
  result.permutation = make_matrix(ctx, n, 1, Dtype::i64);
  result.inverse = make_matrix(ctx, n, 1, Dtype::i64);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    Layout layout;
    const size_t sorted_keys = layout.add<Key>(n);
    const size_t rows = layout.add<uint32_t>(n);
    const size_t sorted_rows = layout.add<uint32_t>(n);
    const std::shared_ptr<void> memory = ctx.allocate(layout.bytes());
    const SortArrays<Key> arrays = {codes.as<Key>(), Layout::at<Key>(memory, sorted_keys),
                                    Layout::at<uint32_t>(memory, rows),
                                    Layout::at<uint32_t>(memory, sorted_rows)};
    launch(ctx, over(ctx, n), number_rows, Layout::at<uint32_t>(memory, rows), n);
    sort_by_key(ctx, arrays, n, 8 * sizeof(Key));
    launch(ctx, over(ctx, n), write_permutations, arrays.sorted_values, n,
           result.permutation.as<int64_t>(), result.inverse.as<int64_t>());
  });
  return result;
}

}  // namespace voxgemm::cuda

// SPDX-License-Identifier: Apache-2.0
#include "conv/curve.h"

#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/each.cuh"
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
  const std::shared_ptr<void> memory = ctx.allocate(2 * sizeof(uint32_t) * n);
  auto* rows = static_cast<uint32_t*>(memory.get());
  uint32_t* sorted_rows = rows + n;
  for_each(ctx, n, [=] __device__(int64_t r) { rows[r] = static_cast<uint32_t>(r); });
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    const std::shared_ptr<void> sorted = ctx.allocate(sizeof(Key) * n);
    const SortArrays<Key> arrays = {codes.as<Key>(), static_cast<Key*>(sorted.get()), rows,
                                    sorted_rows};
    sort_by_key(ctx, arrays, n, 8 * sizeof(Key));
  });
  auto* permutation = result.permutation.as<int64_t>();
  auto* inverse = result.inverse.as<int64_t>();
  for_each(ctx, n, [=] __device__(int64_t i) {
    permutation[i] = sorted_rows[i];
    inverse[sorted_rows[i]] = i;
  });
  return result;
}

}  // namespace voxgemm::cuda

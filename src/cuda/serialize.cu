// SPDX-License-Identifier: Apache-2.0

#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cuda/launch.cuh"
#include "cuda/sorting.h"

namespace voxgemm::cuda {
SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes) {
  const int64_t n = codes.rows;
  SortedCodes result;
  result.permutation = make_matrix(ctx, n, 1, Dtype::i64);
  result.inverse = make_matrix(ctx, n, 1, Dtype::i64);
  uint32_t* rows = nullptr;
  uint32_t* sorted_rows = nullptr;
  const std::shared_ptr<void> memory = make_room(ctx, Room{&rows, n}, Room{&sorted_rows, n});
  for_each(ctx, n, [=] __device__(int64_t r) { rows[r] = static_cast<uint32_t>(r); });
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    const std::shared_ptr<void> sorted = ctx.allocate(sizeof(Key) * n);
    sort_by_key<Key>(ctx, {codes.as<Key>(), static_cast<Key*>(sorted.get()), rows, sorted_rows}, n,
                     8 * sizeof(Key));
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

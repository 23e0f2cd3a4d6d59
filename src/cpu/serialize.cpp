// SPDX-License-Identifier: Apache-2.0
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cpu/brick_set.h"
#include "cpu/sorting.h"
#include "cpu/voxel_index.h"

namespace voxgemm::cpu {

void sort_codes(const Context& ctx, const MatrixRef& codes, const SortedCodes& sorted) {
  std::shared_ptr<KeyedRow[]> rows = make_keyed_rows(ctx, codes.rows);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_each(ctx, codes.rows, [&](int64_t r) {
      rows[r] = {codes.as<Key>()[r], static_cast<uint32_t>(r)};
    });
  });
  sort_rows(ctx, &rows, codes.rows);
  for_each(ctx, codes.rows, [&](int64_t i) {
    sorted.permutation.as<int64_t>()[i] = rows[i].row;
    sorted.inverse.as<int64_t>()[rows[i].row] = i;
  });
}

}  // namespace voxgemm::cpu

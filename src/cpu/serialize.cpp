// SPDX-License-Identifier: Apache-2.0
#include "conv/curve.h"
#include "conv/operators.h"
#include "core/dispatch_key.h"
#include "cpu/brick_set.h"
#include "cpu/sorting.h"
#include "cpu/voxel_index.h"

namespace voxgemm::cpu {

void curve_encode(const Context& ctx,
                  const MatrixRef& coords,
                  const CurveOptions& options,
                  const MatrixRef& codes) {
  const CurveRule rule(options);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_pieces(ctx, coords.rows, rows_per_task, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        codes.as<Key>()[r] = static_cast<Key>(curve_code(rule, coords.as<int32_t>() + 4 * r));
      }
    });
  });
}

void curve_decode(const Context& ctx,
                  const MatrixRef& codes,
                  const CurveOptions& options,
                  const MatrixRef& coords) {
  const CurveRule rule(options);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_pieces(ctx, coords.rows, rows_per_task, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        curve_voxel(rule, codes.as<Key>()[r], coords.as<int32_t>() + 4 * r);
      }
    });
  });
}

SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes) {
  std::shared_ptr<KeyedRow[]> rows = make_keyed_rows(ctx, codes.rows);
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_pieces(ctx, codes.rows, rows_per_task, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        rows[r] = {codes.as<Key>()[r], static_cast<uint32_t>(r)};
      }
    });
  });
  sort_rows(ctx, &rows, codes.rows);
  SortedCodes result;
  result.permutation = make_matrix(ctx, codes.rows, 1, Dtype::i64);
  result.inverse = make_matrix(ctx, codes.rows, 1, Dtype::i64);
  for_pieces(ctx, codes.rows, rows_per_task, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      result.permutation.as<int64_t>()[i] = rows[i].row;
      result.inverse.as<int64_t>()[rows[i].row] = i;
    }
  });
  return result;
}

}  // namespace voxgemm::cpu

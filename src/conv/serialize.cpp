// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/serialize.h"

#include <algorithm>

#include "conv/items.h"
#include "conv/operators.h"
#include "conv/validate.h"
#include "core/dispatch_key.h"
#include "voxgemm/coords.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

void validate_curve(const CurveOptions& options, Dtype dtype) {
  validate_enumerator(options.curve, Curve::rows, "the curve");
  const int most = dtype == Dtype::i32 ? 10 : 21;
  check(options.bits >= 0 && options.bits <= most, "a curve has ", options.bits,
        " bits an axis, expected 0 to ", most, " for codes of ", name(dtype));
  Int3 sorted = options.axes;
  std::sort(sorted.begin(), sorted.end());
  check(sorted == Int3{0, 1, 2}, "the axes of a curve are ", options.axes[0], ", ", options.axes[1],
        ", ", options.axes[2], ", expected a permutation of 0, 1, 2");
}

}  // namespace

void curve_encode(const Context& ctx,
                  const MatrixRef& coords,
                  const CurveOptions& options,
                  const MatrixRef& codes) {
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  validate_column(ctx, codes, {"codes", coords.rows, 1, integer_dtype(codes, "codes")});
  validate_curve(options, codes.dtype);
  validate_apart(memory_of(codes, "codes"), memory_of(coords, "coords"));
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_items(ctx, coords.rows,
              CurveEncoder<Key>{coords.as<int32_t>(), CurveRule(options), codes.as<Key>()});
  });
}

void curve_decode(const Context& ctx,
                  const MatrixRef& codes,
                  const CurveOptions& options,
                  const MatrixRef& coords) {
  validate_coords(ctx, coords, std::nullopt, std::nullopt);
  validate_column(ctx, codes, {"codes", coords.rows, 1, integer_dtype(codes, "codes")});
  validate_curve(options, codes.dtype);
  validate_apart(memory_of(coords, "coords"), memory_of(codes, "codes"));
  dispatch_key(codes.dtype, [&]<class Key>(Type<Key>) {
    for_items(ctx, codes.rows,
              CurveDecoder<Key>{codes.as<Key>(), CurveRule(options), coords.as<int32_t>()});
  });
}

SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes) {
  validate_column(ctx, codes, {"codes", codes.rows, 1, integer_dtype(codes, "codes")});
  validate_sortable(codes.rows);
  SortedCodes sorted{make_matrix(ctx, codes.rows, 1, Dtype::i64),
                     make_matrix(ctx, codes.rows, 1, Dtype::i64)};
  run(ctx, cuda::sort_codes, cpu::sort_codes, codes, sorted);
  return sorted;
}

}  // namespace voxgemm

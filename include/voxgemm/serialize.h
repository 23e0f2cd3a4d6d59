// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/context.h"
#include "voxgemm/geometry.h"

namespace voxgemm {

// Voxels as numbers whose order keeps neighbours close.
enum class Curve {
  z_order,  // the bits of the three axes interleaved, the most significant axis first
  hilbert,  // Skilling's construction: consecutive codes are neighbouring voxels
  rows,     // the three axes side by side: lexicographic order
};
constexpr int curve_count = 3;

struct CurveOptions {
  Curve curve = Curve::z_order;
  int bits = 16;            // of each axis: coordinates in [0, 2^bits); 3 * bits fit a code
  Int3 axes = {0, 1, 2};    // a permutation of (x, y, z): the most significant axis first
  Int3 origin = {0, 0, 0};  // subtracted from x, y, z first (and added by curve_decode)
};

// codes[r] = batch << 3 * bits | place on the curve. coords: i32 [n, 4], read. codes: i32 or i64
// [n, 1], contiguous, taken as unsigned: ascending codes stand batch by batch in the curve's order.
// A batch must fit the bits that are left; bits that do not fit are dropped, and coordinates are
// taken modulo 2^bits (validate_coords() is the check). n = 0 writes nothing.
VOXGEMM_EXPORT void curve_encode(const Context& ctx,
                                 const MatrixRef& coords,
                                 const CurveOptions& options,
                                 const MatrixRef& codes);
// The coordinates of codes that curve_encode() made with these options. coords: i32 [n, 4],
// contiguous, written.
VOXGEMM_EXPORT void curve_decode(const Context& ctx,
                                 const MatrixRef& codes,
                                 const CurveOptions& options,
                                 const MatrixRef& coords);

struct SortedCodes {
  Matrix permutation;  // i64 [n, 1]: rows by ascending code, ties by row
  Matrix inverse;      // i64 [n, 1]: inverse[permutation[i]] = i
};
// codes: i32 or i64 [n, 1], contiguous, taken as unsigned, read.
VOXGEMM_EXPORT SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes);

}  // namespace voxgemm

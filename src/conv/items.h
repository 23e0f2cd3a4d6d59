// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <variant>

#include "conv/backend.h"
#include "conv/curve.h"
#include "conv/distinct.h"
#include "conv/hash_key.h"
#include "conv/sample_point.h"
#include "conv/tap_counts.h"

namespace voxgemm {

// Operators that treat every row by itself, and on both backends alike: what is done with a row,
// written once, called with its number.
using Item = std::variant<CurveEncoder<uint32_t>,
                          CurveEncoder<uint64_t>,
                          CurveDecoder<uint32_t>,
                          CurveDecoder<uint64_t>,
                          HashLookup<uint32_t, uint32_t>,
                          HashLookup<uint32_t, uint64_t>,
                          HashLookup<uint64_t, uint32_t>,
                          HashLookup<uint64_t, uint64_t>,
                          VoxelNumbers<uint32_t>,
                          VoxelNumbers<uint64_t>,
                          DistinctMarks,
                          DistinctRows,
                          TapCounts,
                          PointGradients<float>,
                          PointGradients<double>>;

namespace cpu {
void for_items(const Context& ctx, int64_t count, const Item& item);
}  // namespace cpu
namespace cuda {
void for_items(const Context& ctx, int64_t count, const Item& item);
}  // namespace cuda

// Calls item(i) for every i below count on the context's device.
inline void for_items(const Context& ctx, int64_t count, const Item& item) {
  run(ctx, cuda::for_items, cpu::for_items, count, item);
}

}  // namespace voxgemm

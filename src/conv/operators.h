// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/hash_table.h"
#include "voxgemm/serialize.h"

// The public functions beside convolution, once per backend and without their argument checks.
// Integer results are the same bits on both. Nothing here waits for a CUDA device unless it says
// so.
namespace voxgemm {
namespace cpu {

void curve_encode(const Context& ctx,
                  const MatrixRef& coords,
                  const CurveOptions& options,
                  const MatrixRef& codes);
void curve_decode(const Context& ctx,
                  const MatrixRef& codes,
                  const CurveOptions& options,
                  const MatrixRef& coords);
SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes);

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert);
void hash_lookup(const Context& ctx,
                 const HashTableRef& table,
                 const MatrixRef& keys,
                 const MatrixRef& values);
void voxel_keys(const Context& ctx,
                const MatrixRef& coords,
                const Int3& shape,
                const MatrixRef& keys);

}  // namespace cpu
namespace cuda {

void curve_encode(const Context& ctx,
                  const MatrixRef& coords,
                  const CurveOptions& options,
                  const MatrixRef& codes);
void curve_decode(const Context& ctx,
                  const MatrixRef& codes,
                  const CurveOptions& options,
                  const MatrixRef& coords);
SortedCodes sort_codes(const Context& ctx, const MatrixRef& codes);

Matrix hash_insert(const Context& ctx, const HashTableRef& table, const HashInsert& insert);
// Waits for the device.
std::array<int64_t, 2> read_hash_status(const Context& ctx, const MatrixRef& status);
void hash_lookup(const Context& ctx,
                 const HashTableRef& table,
                 const MatrixRef& keys,
                 const MatrixRef& values);
void voxel_keys(const Context& ctx,
                const MatrixRef& coords,
                const Int3& shape,
                const MatrixRef& keys);

}  // namespace cuda
}  // namespace voxgemm

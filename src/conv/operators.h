// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "voxgemm/depthwise.h"
#include "voxgemm/hash_table.h"
#include "voxgemm/pooling.h"
#include "voxgemm/sampling.h"
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

SampleMap sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options);
void sample_map_grad(const Context& ctx,
                     const MatrixRef& points,
                     const SampleMap& map,
                     const MatrixRef& dweights,
                     const MatrixRef& dpoints);
void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y);
void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx);
void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums);

// For the gradients here `transposed` is given (the map itself where it is symmetric), dy has its
// repeated rows merged, and dx of repeated rows is left to the caller.
void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result);
void pool_grad(const Context& ctx,
               const KernelMap& map,
               Reduction reduction,
               const PoolGrad& grad,
               const MatrixRef& dx);
void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result);
void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y);
void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx);
void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw);

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

SampleMap sample_map(const Context& ctx,
                     const VoxelIndex::State& index,
                     const PointsRef& points,
                     const SampleOptions& options);
void sample_map_grad(const Context& ctx,
                     const MatrixRef& points,
                     const SampleMap& map,
                     const MatrixRef& dweights,
                     const MatrixRef& dpoints);
void weighted_sum(const Context& ctx,
                  const MatrixRef& x,
                  const RowWeights& sums,
                  const MatrixRef& y);
void weighted_sum_grad_input(const Context& ctx,
                             const MatrixRef& dy,
                             const RowWeights& sums,
                             const MatrixRef& dx);
void weighted_sum_grad_weights(const Context& ctx,
                               const MatrixRef& x,
                               const MatrixRef& dy,
                               const RowWeights& sums);

void pool(const Context& ctx,
          const KernelMap& map,
          const MatrixRef& x,
          Reduction reduction,
          const Reduced& result);
void pool_grad(const Context& ctx,
               const KernelMap& map,
               Reduction reduction,
               const PoolGrad& grad,
               const MatrixRef& dx);
void segment_reduce(const Context& ctx,
                    const MatrixRef& x,
                    const MatrixRef& segments,
                    Reduction reduction,
                    const Reduced& result);
void depthwise_forward(const Context& ctx,
                       const KernelMap& map,
                       const DepthwiseForward& operands,
                       const MatrixRef& y);
void depthwise_grad_input(const Context& ctx,
                          const KernelMap& map,
                          const DepthwiseGradInput& operands,
                          const MatrixRef& dx);
void depthwise_grad_weight(const Context& ctx,
                           const KernelMap& map,
                           const MatrixRef& x,
                           const MatrixRef& dy,
                           const MatrixRef& dw);

}  // namespace cuda
}  // namespace voxgemm

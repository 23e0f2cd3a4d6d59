// SPDX-License-Identifier: Apache-2.0
// Stands for src/cuda's part of conv/operators.h in builds without it.
#include "conv/operators.h"

#include "conv/items.h"
#include "voxgemm/error.h"

namespace voxgemm::cuda {
namespace {

[[noreturn]] void absent() {
  fail(ErrorCode::unsupported, true,
       "this build of voxgemm has no CUDA backend, expected a CPU context");
}

}  // namespace

void for_items(const Context&, int64_t, const Item&) { absent(); }
void sort_codes(const Context&, const MatrixRef&, const SortedCodes&) { absent(); }
Matrix hash_insert(const Context&, const HashTableRef&, const HashInsert&) { absent(); }
void fill_sample_map(const Context&,
                     const VoxelIndex::State&,
                     const PointsRef&,
                     const SampleOptions&,
                     const SampleMap&) {
  absent();
}
void weighted_sum(const Context&, const MatrixRef&, const RowWeights&, const MatrixRef&) {
  absent();
}
void weighted_sum_grad_input(const Context&,
                             const MatrixRef&,
                             const RowWeights&,
                             const MatrixRef&) {
  absent();
}
void weighted_sum_grad_weights(const Context&,
                               const MatrixRef&,
                               const MatrixRef&,
                               const RowWeights&) {
  absent();
}

void pool(const Context&, const KernelMap&, const MatrixRef&, Reduction, const Reduced&) {
  absent();
}
void pool_grad(const Context&, const PoolBack&, const MatrixRef&) { absent(); }
void segment_reduce(const Context&, const MatrixRef&, const MatrixRef&, Reduction, const Reduced&) {
  absent();
}
void depthwise_forward(const Context&,
                       const KernelMap&,
                       const DepthwiseForward&,
                       const MatrixRef&) {
  absent();
}
void depthwise_grad_input(const Context&,
                          const KernelMap&,
                          const DepthwiseGradInput&,
                          const MatrixRef&) {
  absent();
}
void depthwise_grad_weight(
    const Context&, const KernelMap&, const MatrixRef&, const MatrixRef&, const MatrixRef&) {
  absent();
}

}  // namespace voxgemm::cuda

// SPDX-License-Identifier: Apache-2.0
// Stands for src/cuda in builds without it: every entry says so.
#include "conv/backend.h"
#include "conv/coords.h"
#include "conv/kernel.h"
#include "conv/passes.h"
#include "conv/schedule.h"
#include "voxgemm/cuda.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

[[noreturn]] void absent() {
  fail(ErrorCode::unsupported, true,
       "this build of voxgemm has no CUDA backend, expected a CPU context");
}

}  // namespace

Context cuda_context(int) { absent(); }
void synchronize(const Context&) { absent(); }
void copy(const Context&, const MatrixRef&, const MatrixRef&) { absent(); }

namespace cuda {

std::vector<Kernel> kernels() { return {}; }

int64_t first_row_outside(const Context&, const MatrixRef&, const std::array<int64_t, 4>&) {
  absent();
}
std::unique_ptr<VoxelIndex::State> make_index(const Context&, const MatrixRef&) { absent(); }
Matrix first_rows(const Context&, const VoxelIndex::State&, const MatrixRef&) { absent(); }
void exclusive_sums(const Context&, uint32_t*, int64_t) { absent(); }
Matrix output_coords(const Context&, const MatrixRef&, const Geometry&, const OutputOptions&) {
  absent();
}
void fill_submanifold_map(
    const Context&, const VoxelIndex::State*, const MatrixRef&, KernelMap*, int64_t*) {
  absent();
}
void fill_kernel_map(const Context&, const MatrixRef&, const MatrixRef&, KernelMap*, int64_t*) {
  absent();
}
void fill_transposed(const Context&, const KernelMap&, KernelMap*) { absent(); }
void check_built(const KernelMap&, int64_t) { absent(); }
ScheduleParts build_schedule(const Context&, const KernelMap&, const ScheduleOptions&) { absent(); }

DeviceGuard::DeviceGuard(const Device&) { absent(); }
DeviceGuard::~DeviceGuard() = default;
Matrix merge_repeated(const Context&, const MatrixRef&, const MatrixRef&) { absent(); }
void zero_repeated(const Context&, const MatrixRef&, const MatrixRef&) { absent(); }
void fill_zero(const Context&, const WeightsRef&) { absent(); }
void grad_bias(const Context&, const MatrixRef&, const MatrixRef&) { absent(); }
int architecture(const Device&) { absent(); }
std::string model(const Device&) { absent(); }
void load_kernels(const Device&) { absent(); }
bool is_capturing(const Context&) { absent(); }
void read_back(const Context&, const void*, void*, size_t) { absent(); }
double time_calls(const Context&, int, const std::function<void()>&) { absent(); }

}  // namespace cuda
}  // namespace voxgemm

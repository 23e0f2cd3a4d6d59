// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>
#include <limits>

#include "cuda/device.h"

namespace voxgemm::cuda {

struct Grid {
  int64_t blocks = 0;   // none: nothing is launched
  int64_t columns = 1;  // of blocks, blockIdx.y
  int threads = 256;
  size_t shared_bytes = 0;  // dynamic
  // May start while the launch before it ends, and waits for it itself (ptx::wait_for_last_launch).
  bool overlaps = false;
};

// The only place that launches: in the context's stream, checked. The context's device is current.
template <class... Parameters, class... Arguments>
void launch(const Context& ctx,
            const Grid& grid,
            void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (grid.blocks == 0 || grid.columns == 0) return;
  constexpr int64_t most_blocks = std::numeric_limits<int32_t>::max();
  constexpr int64_t most_columns = 65535;
  check(grid.blocks <= most_blocks && grid.columns <= most_columns, ErrorCode::unsupported,
        "a launch of ", grid.blocks, " x ", grid.columns, " blocks is larger than ", most_blocks,
        " x ", most_columns);
  // What every device gives without being asked.
  constexpr size_t plain_shared_bytes = size_t{48} << 10;
  if (grid.shared_bytes > plain_shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared_bytes)),
               "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.columns));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = &overlap;
  config.numAttrs = grid.overlaps ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
             "a kernel launch");
}

// A tensor of 16-bit elements as tensor copies of boxes read it (sm_90); what is past the end reads
// as zero. Strides in bytes.
inline CUtensorMap tensor_map(const void* data,
                              const int64_t (&sizes)[3],
                              const int64_t (&strides)[2],
                              const cuuint32_t (&box)[3],
                              CUtensorMapSwizzle swizzle) {
  // The driver's function, found at run time: linking libcuda would tie the library to a driver.
  static const auto encode = [] {
    void* found = nullptr;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault),
               "cudaGetDriverEntryPointByVersion");
    check(found != nullptr, ErrorCode::device, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  constexpr cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(data),
      reinterpret_cast<const cuuint64_t*>(sizes), reinterpret_cast<const cuuint64_t*>(strides), box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorCode::device, "cuTensorMapEncodeTiled failed with ",
        static_cast<int>(status));
  return map;
}

// Loads a kernel's code on the current device, and with it what all kernels of its file share: else
// their first launch does, which takes 1 to 9 ms longer for it (H200). Another kernel of the file
// then takes 0.1 to 0.4 ms the first time. One that cannot be loaded says so when it is launched.
template <class... Parameters>
void load(void (*kernel)(Parameters...)) {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) cudaGetLastError();
}

// Blocks of a multiprocessor for __launch_bounds__: as many as were chosen on Hopper, and no demand
// elsewhere, where the same code takes a few registers more and would spill.
constexpr int blocks_here(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
  return blocks > 0 ? 1 : blocks;
#else
  return blocks;
#endif
}

// A matrix for kernels.
template <class T>
struct View {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  explicit View(const MatrixRef& m)
      : data(m.as<T>()), rows(m.rows), cols(m.cols), stride(m.stride) {}
  __device__ T* at(int64_t row, int64_t col) const { return data + row * stride + col; }
};

// The place of this thread among all of the launch.
__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// What join makes of the values of a warp, in every lane: sm_75 has no instruction for it.
template <class Join>
__device__ inline uint32_t over_warp(uint32_t value, const Join& join) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffff, value, lanes));
  }
  return value;
}

// Threads for a loop over items: enough to fill the device, so that a block of threads that ends
// with something costly (a global count) does so rarely. Eight such blocks are all that a
// multiprocessor holds.
inline Grid over(const Context& ctx, int64_t items) {
  constexpr int threads = Grid{}.threads;
  return {.blocks = std::min<int64_t>(ceil_div(items, threads), 8 * multiprocessors(ctx))};
}

// Calls body(i), a functor or a lambda of device code that captures by value, for every i below
// count.
template <class Body>
__global__ void run_each(int64_t count, const __grid_constant__ Body body) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) body(i);
}
template <class Body>
void for_each(const Context& ctx, int64_t count, const Body& body) {
  launch(ctx, over(ctx, count), run_each<Body>, count, body);
}

}  // namespace voxgemm::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <optional>

#include "cuda/device.h"
#include "support/run.h"
#include "voxgemm/cuda.h"
#include "voxgemm/error.h"
#include "voxgemm/schedule.h"

namespace voxgemm::test {

// A context on the first CUDA device, or nothing where there is none.
inline const std::optional<Context>& gpu() {
  static const std::optional<Context> ctx = []() -> std::optional<Context> {
    try {
      return cuda_context(0);
    } catch (const Error&) {
      return std::nullopt;
    }
  }();
  return ctx;
}

// Tests that need a CUDA device; they say so where there is none.
class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!gpu()) GTEST_SKIP() << "there is no CUDA device";
  }
};

// A context whose memory comes from one allocation and is never reused, as a graph needs it.
inline Context arena_context(const Context& ctx, size_t bytes) {
  Context arena = ctx;
  const std::shared_ptr<void> memory = ctx.allocate(bytes);
  arena.allocate = [memory, bytes, used = size_t{0}](size_t size) mutable {
    const size_t place = used;
    used += (size + 255) / 256 * 256;
    check(used <= bytes, ErrorCode::out_of_memory, "the arena is too small");
    return std::shared_ptr<void>(memory, static_cast<char*>(memory.get()) + place);
  };
  return arena;
}

inline Matrix to_device(const Context& ctx, const MatrixRef& host) {
  Matrix device = make_matrix(ctx, host.rows, host.cols, host.dtype);
  copy(ctx, host, device);
  return device;
}
inline Matrix to_host(const Context& ctx, const MatrixRef& device) {
  Matrix host = make_matrix(context(), device.rows, device.cols, device.dtype);
  copy(ctx, device, host);
  return host;
}

inline Matrix coords_on_device(const Context& ctx, const Voxels& voxels) {
  return to_device(ctx, coords_matrix(context(), voxels));
}

// The schedule of a map whose twin on the host is `host`, built there.
inline Schedule device_schedule(const Context& ctx,
                                const KernelMap& host,
                                const KernelMap& device,
                                const ScheduleOptions& options) {
  const Schedule built = Schedule::build(context(), host, options);
  ScheduleParts parts = built.parts();
  for (Matrix* part : {&parts.order, &parts.chunk_tiles, &parts.tiles, &parts.masks,
                       &parts.block_taps, &parts.indices}) {
    if (!part->empty()) *part = to_device(ctx, *part);
  }
  return Schedule::from_parts(device, options, std::move(parts));
}

// Of a contiguous matrix of any device.
template <class T>
std::vector<T> fetched(const Context& ctx, const MatrixRef& m) {
  const Matrix host = m.device.kind == DeviceKind::cuda ? to_host(ctx, m) : Matrix{m, {}};
  return {host.as<T>(), host.as<T>() + host.rows * host.cols};
}

// Pinned memory for what a map tells the host.
class Answer {
 public:
  Answer() {
    cuda::check_cuda(cudaMallocHost(reinterpret_cast<void**>(&numbers_), 3 * sizeof(int64_t)),
                     "cudaMallocHost");
    std::fill_n(numbers_, 3, INT64_MIN);
  }
  ~Answer() { cudaFreeHost(numbers_); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;
  int64_t* numbers() const { return numbers_; }
  // Once the device is done.
  void expect(const KernelMap& map) const {
    const Context& ctx = *gpu();
    std::vector<int64_t> expected = {fetched<int64_t>(ctx, map.pairs_per_tap)[0]};
    for (const Matrix& number : {map.in_repeats, map.out_repeats}) {
      expected.push_back(fetched<int64_t>(ctx, number)[0]);
    }
    ASSERT_EQ(std::vector(numbers_, numbers_ + 3), expected);
  }

 private:
  int64_t* numbers_ = nullptr;
};

// Where a map leaves the first rows out because nothing repeats, they are the rows themselves.
inline std::vector<int32_t> all_first_rows(const Context& ctx,
                                           const MatrixRef& first,
                                           int64_t rows) {
  std::vector<int32_t> list(rows);
  std::iota(list.begin(), list.end(), 0);
  return first.rows == 0 ? list : fetched<int32_t>(ctx, first);
}

}  // namespace voxgemm::test

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/host_device.h"
#include "voxgemm/kernel_map.h"

namespace voxgemm {

// Of how many input rows an output row of a map is made.
struct TapCounts {
  const int32_t* neighbours;  // [taps, rows]
  int64_t stride;
  int taps;
  int64_t n_in;  // rows outside [0, n_in) are absent
  int32_t* counts;

  TapCounts(const KernelMap& map, const MatrixRef& result)
      : neighbours(map.neighbours.as<int32_t>()),
        stride(map.neighbours.stride),
        taps(map.taps()),
        n_in(map.n_in),
        counts(result.as<int32_t>()) {}
  VOXGEMM_HOST_DEVICE void operator()(int64_t row) const {
    int32_t count = 0;
    for (int tap = 0; tap < taps; ++tap) {
      count += static_cast<uint32_t>(neighbours[tap * stride + row]) < n_in ? 1 : 0;
    }
    counts[row] = count;
  }
};

}  // namespace voxgemm

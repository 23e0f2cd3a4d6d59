// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mutex>
#include <unordered_map>

#include "convert.h"

namespace voxgemm {

// The schedules of the maps that a Python KernelMap owns, for operators that are given none: those
// of traced graphs (docs/decisions/0010). A map is known by the address of its neighbours: what is
// kept holds them, so that the address is nobody else's until the owner has it forgotten. In other
// streams than that of the map nothing is found or kept: nobody says there that it is ready, and
// the compiler's CUDA graphs run operators for trial in a stream with memory of its own.
class KeptSchedules {
 public:
  void own(const Context& ctx, const Tensor& neighbours);
  void forget(const Tensor& neighbours);

  // The one that is kept; or a new one, which is kept if the map is owned and no CUDA graph is
  // captured.
  Schedule get(const Context& ctx, const KernelMap& map, const ScheduleOptions& options);

  // Of a map, as far as they are kept.
  std::vector<Schedule> of(const Tensor& neighbours);

 private:
  struct Owned {
    Tensor neighbours;
    void* stream = nullptr;
    std::vector<Schedule> schedules;
  };

  // Null where the map is not owned or its stream is another one.
  std::vector<Schedule>* schedules_of(const Context& ctx, const KernelMap& map);

  std::mutex mutex_;
  std::unordered_map<const void*, Owned> owned_;
};

// The six tensors of ScheduleParts; none for natural order.
Tensors parts_of(const Schedule& schedule);

// Of this library's kind of device.
KeptSchedules& kept_schedules();

}  // namespace voxgemm

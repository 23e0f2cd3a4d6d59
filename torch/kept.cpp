// SPDX-License-Identifier: Apache-2.0
#include "kept.h"

namespace voxgemm {

void KeptSchedules::own(const Context& ctx, const Tensor& neighbours) {
  if (neighbours.numel() == 0) return;  // no address
  const std::lock_guard lock(mutex_);
  owned_.insert_or_assign(neighbours.data_ptr(), Owned{neighbours, ctx.stream, {}});
}

void KeptSchedules::forget(const Tensor& neighbours) {
  if (neighbours.numel() == 0) return;
  decltype(owned_)::node_type freed;  // behind the lock: freeing memory may take a while
  const std::lock_guard lock(mutex_);
  freed = owned_.extract(neighbours.data_ptr());
}

std::vector<Schedule>* KeptSchedules::schedules_of(const Context& ctx, const KernelMap& map) {
  const auto owned = owned_.find(map.neighbours.data);
  const bool found = owned != owned_.end() && owned->second.stream == ctx.stream;
  return found ? &owned->second.schedules : nullptr;
}

Schedule KeptSchedules::get(const Context& ctx,
                            const KernelMap& map,
                            const ScheduleOptions& options) {
  // What a capture builds is there once the graph runs, and is the graph's.
  if (options.order == ScheduleOptions::Order::natural || is_capturing(ctx)) {
    return Schedule::build(ctx, map, options);
  }
  const auto is_it = [&](const Schedule& schedule) {
    return schedule.options() == options && schedule.rows() == map.n_out &&
           schedule.taps() == map.taps();
  };
  {
    const std::lock_guard lock(mutex_);
    if (const auto* kept = schedules_of(ctx, map)) {
      const auto found = std::ranges::find_if(*kept, is_it);
      if (found != kept->end()) return *found;
    }
  }
  const Schedule built = Schedule::build(ctx, map, options);
  const std::lock_guard lock(mutex_);
  auto* kept = schedules_of(ctx, map);
  // Of two threads that built it, one keeps it.
  if (kept != nullptr && std::ranges::none_of(*kept, is_it)) kept->push_back(built);
  return built;
}

std::vector<Schedule> KeptSchedules::of(const Tensor& neighbours) {
  const std::lock_guard lock(mutex_);
  const auto owned = owned_.find(neighbours.data_ptr());
  return owned == owned_.end() ? std::vector<Schedule>() : owned->second.schedules;
}

Tensors parts_of(const Schedule& schedule) {
  if (schedule.options().order == ScheduleOptions::Order::natural) return {};
  const ScheduleParts& parts = schedule.parts();
  return {tensor_of(parts.order), tensor_of(parts.chunk_tiles), tensor_of(parts.tiles),
          tensor_of(parts.masks), tensor_of(parts.block_taps),  tensor_of(parts.indices)};
}

KeptSchedules& kept_schedules() {
  // Never destroyed: torch's allocators may end before this library does.
  static KeptSchedules* const kept = new KeptSchedules;
  return *kept;
}

}  // namespace voxgemm

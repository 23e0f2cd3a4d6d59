// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "conv/backend.h"
#include "conv/passes.h"
#include "voxgemm/context.h"
#include "voxgemm/error.h"

namespace voxgemm::cuda {

// Throws unless the call, of this name, succeeded: out_of_memory or device.
void check_cuda(cudaError_t status, const char* call, const Condition& place = true);

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream); }

int multiprocessors(const Context& ctx);

// Sets `bytes` bytes of device memory in the stream.
void fill_bytes(const Context& ctx, void* data, int value, size_t bytes);

// The only place where the host waits for the device. Throws during a capture, which that ends.
void read_back(const Context& ctx, const void* device, void* host, size_t bytes);
template <class T>
T read_back(const Context& ctx, const T* device) {
  T host;
  read_back(ctx, device, &host, sizeof(T));
  return host;
}

// Sorts by the low `bits` bits of keys, uint64_t or of 128 bits.
template <class Key>
void sort_keys(const Context& ctx, const Key* keys, Key* sorted, int64_t count, int bits);

// Where the pointer to an array of `count` is wanted.
template <class T>
struct Room {
  T** array;
  int64_t count;
};
// One allocation for several arrays one after another, aligned to 256 bytes; none for no element.
template <class... T>
std::shared_ptr<void> make_room(const Context& ctx, const Room<T>&... rooms) {
  const auto padded = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  const size_t all = (padded(rooms.count * sizeof(T)) + ...);
  std::shared_ptr<void> memory = all > 0 ? ctx.allocate(all) : nullptr;
  auto* next = static_cast<char*>(memory.get());
  const auto take = [&](size_t bytes) { return std::exchange(next, next + padded(bytes)); };
  ((*rooms.array = reinterpret_cast<T*>(take(rooms.count * sizeof(T)))), ...);
  return memory;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace voxgemm::cuda

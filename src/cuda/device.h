// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "conv/passes.h"
#include "voxgemm/context.h"
#include "voxgemm/error.h"

namespace voxgemm::cuda {

// Throws unless the call, of this name, succeeded: out_of_memory or device.
void check_cuda(cudaError_t status, const char* call, const Condition& place = true);

// Makes a device the current one of this host thread until the guard's end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream); }

int multiprocessors(const Context& ctx);

// Sets `bytes` bytes of device memory in the stream.
void fill_bytes(const Context& ctx, void* data, int value, size_t bytes);

// The only place where the host waits for the device. Throws during a capture, which a wait would
// invalidate.
void read_back(const Context& ctx, const void* device, void* host, size_t bytes);
template <class T>
T read_back(const Context& ctx, const T* device) {
  T host;
  read_back(ctx, device, &host, sizeof(T));
  return host;
}

// Where the pointer to an array of `count` is wanted.
template <class T>
struct Room {
  T** array;
  int64_t count;
};
// One allocation for several arrays, aligned to 256 bytes.
template <class... T>
std::shared_ptr<void> make_room(const Context& ctx, const Room<T>&... rooms) {
  const auto padded = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  std::shared_ptr<void> memory = ctx.allocate((padded(rooms.count * sizeof(T)) + ...));
  auto* next = static_cast<char*>(memory.get());
  const auto take = [&](size_t bytes) { return std::exchange(next, next + padded(bytes)); };
  ((*rooms.array = reinterpret_cast<T*>(take(rooms.count * sizeof(T)))), ...);
  return memory;
}

// Cuts one allocation into aligned pieces: add() all of them, allocate bytes(), then at().
class Layout {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t place = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return place;
  }
  size_t bytes() const { return bytes_; }
  template <class T>
  static T* at(const std::shared_ptr<void>& memory, size_t place) {
    return reinterpret_cast<T*>(static_cast<char*>(memory.get()) + place);
  }

 private:
  size_t bytes_ = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace voxgemm::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convert.h"

namespace voxgemm {

// A failure leaves an operator as a runtime_error "[voxgemm CODE] SENTENCE", which crosses torch
// without a word on stderr and which voxgemm.errors turns into the Python type of the code; under
// torch.compile, where no Python of ours stands around the operator, it is a RuntimeError with that
// text.
inline std::runtime_error crossing(std::string_view code, std::string_view sentence) {
  return std::runtime_error(join("[voxgemm ", code, "] ", sentence));
}

inline std::string_view name(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid_argument";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::out_of_memory:
      return "out_of_memory";
    case ErrorCode::device:
      return "device";
  }
  return "?";
}

template <auto op, class Signature = decltype(op)>
struct Guarded;
template <auto op, class Result, class... Args>
struct Guarded<op, Result (*)(Args...)> {
  static Result call(Args... args) {
    try {
      return op(args...);
    } catch (const Error& error) {
      throw crossing(name(error.code()), error.what());
    } catch (const std::bad_alloc&) {
      throw crossing("out_of_memory", "memory ran out");
    }
  }
};

using ::torch::stable::detail::StableLibrary;

// Gives a dispatch key of the library its operators; they run where context_of() says.
void add_operators(StableLibrary& library);
// Those of choosing a kernel; those of the files of measured times, which need no device.
void add_choice_operators(StableLibrary& library);
void add_times_operators(StableLibrary& library);
// Those beside convolution.
void add_voxel_operators(StableLibrary& library);

// The version, a line "- KERNEL" per kernel, and where there is a device a line "DTYPE KERNEL" per
// kernel that can run a pass there.
Tensor info(DeviceKind kind, const Context* ctx);

}  // namespace voxgemm

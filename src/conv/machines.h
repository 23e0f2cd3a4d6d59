// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

// The files of src/conv/machines, as they are.
namespace voxgemm::machines {

extern const std::string_view hopper;

}  // namespace voxgemm::machines

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "voxgemm/error.h"

namespace voxgemm::test {

// The message of the error that `call` throws, which has this code; "no error" where it throws
// none.
template <class Call>
std::string message_of(const Call& call, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  return "no error";
}

}  // namespace voxgemm::test

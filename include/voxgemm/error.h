// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "voxgemm/types.h"

namespace voxgemm {

enum class ErrorCode { invalid_argument, unsupported, out_of_memory, device };

// The only exception of the library; what a function of the caller's throws, or the standard
// library for want of memory, passes through. what() is one sentence for the user, of code
// unsupported with the table of explain() behind it; where() names the check.
class VOXGEMM_EXPORT Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, std::string where = {})
      : std::runtime_error(message), code_(code), where_(std::move(where)) {}
  ErrorCode code() const { return code_; }
  const std::string& where() const { return where_; }

 private:
  ErrorCode code_;
  std::string where_;
};

// A condition and the place it was written, so that check() needs no macro.
struct Condition {
  bool holds;
  const char* file;
  int line;
  // NOLINTNEXTLINE(google-explicit-constructor): a bool becomes a condition at the call.
  Condition(bool value, const char* from = __builtin_FILE(), int at = __builtin_LINE())
      : holds(value), file(from), line(at) {}
};

[[noreturn]] VOXGEMM_EXPORT void fail(ErrorCode code,
                                      const Condition& place,
                                      const std::string& message);

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws Error(code) with the parts joined to one sentence unless the condition holds:
//   check(x.cols == c_in, "x has ", x.cols, " channels, the weights expect ", c_in);
template <class... Parts>
void check(Condition condition, ErrorCode code, const Parts&... parts) {
  if (!condition.holds) fail(code, condition, join(parts...));
}
template <class First, class... Parts>
void check(Condition condition, const First& first, const Parts&... parts) {
  if (!condition.holds) fail(ErrorCode::invalid_argument, condition, join(first, parts...));
}

}  // namespace voxgemm

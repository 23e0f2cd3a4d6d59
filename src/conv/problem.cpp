// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/problem.h"

#include <charconv>
#include <vector>

#include "conv/passes.h"
#include "voxgemm/error.h"

namespace voxgemm {
namespace {

constexpr std::string_view grammar =
    "expected \"PASS DTYPE OPERATION C_IN->C_OUT CLOUD\", e.g. \"forward f32 subm3 64->128 "
    "shell:64\"; PASS is forward, grad_input or grad_weight, DTYPE f16, bf16, f32, f64, "
    "tf32, bf16x3 or bf16x6, OPERATION subm3, conv3s2p1 or inv2s2 (subm, conv or inv; size; then "
    "s, p, d)";

[[noreturn]] void reject(std::string_view word, std::string_view what) {
  fail(ErrorCode::invalid_argument, true, join("\"", word, "\" is not ", what, "; ", grammar));
}

std::vector<std::string_view> words_of(std::string_view text) {
  std::vector<std::string_view> words;
  size_t at = 0;
  while ((at = text.find_first_not_of(' ', at)) != std::string_view::npos) {
    const size_t end = std::min(text.find(' ', at), text.size());
    words.push_back(text.substr(at, end - at));
    at = end;
  }
  return words;
}

template <class Enum>
Enum parse_name(std::string_view word, std::initializer_list<Enum> values, std::string_view what) {
  for (const Enum value : values) {
    if (name(value) == word) return value;
  }
  reject(word, what);
}

void parse_dtype(std::string_view word, Problem* problem) {
  for (const Precision precision : {Precision::tf32, Precision::bf16x3, Precision::bf16x6}) {
    if (name(precision) == word) {
      problem->dtype = Dtype::f32;
      problem->precision = precision;
      return;
    }
  }
  problem->dtype = parse_name(word, {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}, "a dtype");
}

// Takes a number off the front of `rest`.
int take_number(std::string_view* rest, std::string_view word, std::string_view what) {
  int value = 0;
  const auto [end, error] = std::from_chars(rest->data(), rest->data() + rest->size(), value);
  if (error != std::errc{}) reject(word, what);
  rest->remove_prefix(end - rest->data());
  return value;
}

// "3" for all axes or "3x1x5".
Int3 take_three(std::string_view* rest, std::string_view word) {
  Int3 values;
  values[0] = take_number(rest, word, "an operation");
  values[1] = values[2] = values[0];
  if (!rest->starts_with('x')) return values;
  for (int axis = 1; axis < 3; ++axis) {
    if (!rest->starts_with('x')) reject(word, "an operation (one number or three)");
    rest->remove_prefix(1);
    values[axis] = take_number(rest, word, "an operation");
  }
  return values;
}

std::string_view operation_name(Operation operation) {
  switch (operation) {
    case Operation::submanifold:
      return "subm";
    case Operation::strided:
      return "conv";
    case Operation::inverse:
      return "inv";
  }
  return "?";
}

void parse_operation(std::string_view word, Problem* problem) {
  std::string_view rest = word;
  bool known = false;
  for (const Operation operation :
       {Operation::submanifold, Operation::strided, Operation::inverse}) {
    if (known || !rest.starts_with(operation_name(operation))) continue;
    problem->operation = operation;
    rest.remove_prefix(operation_name(operation).size());
    known = true;
  }
  if (!known) reject(word, "an operation");
  Geometry& geometry = problem->geometry;
  geometry.size = take_three(&rest, word);
  std::string seen;
  while (!rest.empty()) {
    const char key = rest.front();
    rest.remove_prefix(1);
    if (seen.find(key) != std::string::npos) reject(word, "an operation (a key stands twice)");
    seen.push_back(key);
    const Int3 values = take_three(&rest, word);
    if (key == 's') {
      geometry.stride = values;
    } else if (key == 'p') {
      geometry.padding = values;
    } else if (key == 'd') {
      geometry.dilation = values;
    } else {
      reject(word, "an operation");
    }
  }
  if (problem->operation == Operation::submanifold) {
    if (geometry.stride != Int3{1, 1, 1} || geometry.padding != Int3{0, 0, 0}) {
      reject(word, "a submanifold operation (its stride is 1, its padding follows from the size)");
    }
    geometry = Geometry::submanifold(geometry.size, geometry.dilation);
  }
  geometry.validate();
}

}  // namespace

void Problem::place(const Context& ctx) {
  device = ctx.device;
  architecture = device.kind == DeviceKind::cuda ? cuda::architecture(device) : 0;
  threads = ctx.threads;
}

std::string Problem::text() const {
  Geometry shown = geometry;
  if (operation == Operation::submanifold) shown.padding = {0, 0, 0};
  std::string text =
      join(name(pass), " ", precision == Precision::ieee ? name(dtype) : name(precision), " ",
           operation_name(operation), shown.text(), " ", c_in, "->", c_out);
  return cloud.empty() ? text : text + " " + cloud;
}

Problem Problem::parse(std::string_view text) {
  const std::vector<std::string_view> words = words_of(text);
  if (words.size() != 4 && words.size() != 5) reject(text, "a problem");
  Problem problem;
  problem.pass =
      parse_name(words[0], {Pass::forward, Pass::grad_input, Pass::grad_weight}, "a pass");
  parse_dtype(words[1], &problem);
  parse_operation(words[2], &problem);
  std::string_view channels = words[3];
  problem.c_in = take_number(&channels, words[3], "C_IN->C_OUT");
  if (!channels.starts_with("->")) reject(words[3], "C_IN->C_OUT");
  channels.remove_prefix(2);
  problem.c_out = take_number(&channels, words[3], "C_IN->C_OUT");
  if (!channels.empty() || problem.c_in < 1 || problem.c_out < 1) {
    reject(words[3], "C_IN->C_OUT");
  }
  if (words.size() == 5) problem.cloud = words[4];
  return problem;
}

}  // namespace voxgemm

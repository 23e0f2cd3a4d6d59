// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace voxgemm::cpu {

template <class Body>
#if defined(__x86_64__)
[[gnu::target("popcnt,bmi,bmi2,lzcnt"), gnu::flatten]]
#endif
void run_with_popcount(const Body& body) {
  body();
}

// Runs body() compiled for CPUs that count bits in one instruction, where this is one. Plain x86-64
// has no such instruction; what body calls is inlined into it, so that it gets the instruction too.
template <class Body>
void with_popcount(const Body& body) {
#if defined(__x86_64__) && !defined(__BMI2__)
  if (__builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2")) {
    run_with_popcount(body);
    return;
  }
#endif
  body();
}

}  // namespace voxgemm::cpu

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "voxgemm/context.h"

namespace voxgemm::cpu {

template <class Body>
#if defined(__x86_64__)
[[gnu::target("avx2"), gnu::flatten]]
#endif
void run_with_avx2(const Body& body) {
  body();
}

// Runs body(first, last) over pieces of [0, items), compiled for AVX2 where the CPU has it; what
// body calls is inlined and so compiled too. Nothing is contracted: results are the same bits.
template <class Body>
void for_vector_pieces(const Context& ctx, int64_t items, int64_t piece, const Body& body) {
  parallel_for(ctx, (items + piece - 1) / piece, [&](int64_t task, int) {
    const auto run = [&] { body(task * piece, std::min(items, (task + 1) * piece)); };
#if defined(__x86_64__) && !defined(__AVX2__)
    if (__builtin_cpu_supports("avx2")) return run_with_avx2(run);
#endif
    run();
  });
}

}  // namespace voxgemm::cpu

// SPDX-License-Identifier: Apache-2.0
#include "cpu/sorting.h"

#include <algorithm>
#include <array>
#include <vector>

namespace voxgemm::cpu {
namespace {

// Rows counted and moved by one task.
constexpr int64_t piece = int64_t{1} << 16;
constexpr int digit_bits = 8;
constexpr size_t digits = size_t{1} << digit_bits;

using Counts = std::array<int64_t, digits>;

struct Pass {
  const KeyedRow* from;
  KeyedRow* to;
  int64_t count;
  int shift;

  size_t digit(int64_t i) const { return from[i].key >> shift & (digits - 1); }
  template <class Body>
  void for_rows(int64_t task, const Body& body) const {
    const int64_t last = std::min(count, (task + 1) * piece);
    for (int64_t i = task * piece; i < last; ++i) body(i);
  }
};

void move_rows(const Context& ctx, const Pass& pass, std::vector<Counts>* counts) {
  const auto tasks = static_cast<int64_t>(counts->size());
  parallel_for(ctx, tasks, [&](int64_t task, int) {
    Counts own = {};
    pass.for_rows(task, [&](int64_t i) { ++own[pass.digit(i)]; });
    (*counts)[task] = own;
  });
  // Where each task's rows of each digit begin.
  int64_t next = 0;
  for (size_t digit = 0; digit < digits; ++digit) {
    for (Counts& own : *counts) {
      const int64_t rows = own[digit];
      own[digit] = next;
      next += rows;
    }
  }
  parallel_for(ctx, tasks, [&](int64_t task, int) {
    Counts place = (*counts)[task];
    pass.for_rows(task, [&](int64_t i) { pass.to[place[pass.digit(i)]++] = pass.from[i]; });
  });
}

}  // namespace

std::shared_ptr<KeyedRow[]> make_keyed_rows(const Context& ctx, int64_t count) {
  const std::shared_ptr<void> memory = ctx.allocate(sizeof(KeyedRow) * static_cast<size_t>(count));
  return {memory, static_cast<KeyedRow*>(memory.get())};
}

void sort_rows(const Context& ctx, std::shared_ptr<KeyedRow[]>* rows, int64_t count) {
  if (count == 0) return;
  uint64_t different = 0;
  for (int64_t i = 1; i < count; ++i) different |= (*rows)[i].key ^ (*rows)[0].key;
  if (different == 0) return;
  std::shared_ptr<KeyedRow[]> other = make_keyed_rows(ctx, count);
  std::vector<Counts> counts(static_cast<size_t>((count + piece - 1) / piece));
  for (int shift = 0; shift < 64; shift += digit_bits) {
    if ((different >> shift & (digits - 1)) == 0) continue;
    move_rows(ctx, {rows->get(), other.get(), count, shift}, &counts);
    rows->swap(other);
  }
}

}  // namespace voxgemm::cpu

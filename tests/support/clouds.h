// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "voxgemm/context.h"

namespace voxgemm::test {

using Voxel = std::array<int32_t, 4>;  // batch, x, y, z
using Voxels = std::vector<Voxel>;

// The same numbers on every platform, unlike std's distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  explicit Random(std::string_view text) : state_(0) {
    for (const char c : text) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  // splitmix64
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // In [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  // In [-1, 1).
  double real() { return std::ldexp(static_cast<double>(bits() >> 11), -52) - 1; }
  template <class List>
  const auto& pick(const List& list) {
    return list[integer(0, static_cast<int64_t>(std::size(list)) - 1)];
  }
  template <class T>
  void shuffle(std::vector<T>* list) {
    for (size_t i = list->size(); i > 1; --i) std::swap((*list)[i - 1], (*list)[bits() % i]);
  }

 private:
  uint64_t state_;
};

inline Voxels full_cloud(int extent) {
  Voxels voxels;
  for (int x = 0; x < extent; ++x) {
    for (int y = 0; y < extent; ++y) {
      for (int z = 0; z < extent; ++z) voxels.push_back({0, x, y, z});
    }
  }
  return voxels;
}

// resolution/2 - 1.25 <= distance from the centre <= resolution/2.
inline Voxels shell_cloud(int resolution) {
  Voxels voxels = full_cloud(resolution);
  std::erase_if(voxels, [&](const Voxel& v) {
    const double half = resolution / 2.0;
    const double distance = std::hypot(v[1] - half + 0.5, v[2] - half + 0.5, v[3] - half + 0.5);
    return distance < half - 1.25 || distance > half;
  });
  return voxels;
}

// Ground with holes, two walls and a post, around the origin: the density of a scanned street.
inline Voxels street_cloud() {
  Random random("street");
  Voxels voxels;
  for (int x = -10; x < 10; ++x) {
    for (int y = -6; y < 6; ++y) {
      if (random.integer(0, 9) < 7) voxels.push_back({0, x, y, 0});
    }
    for (int z = 1; z < 6; ++z) {
      if (random.integer(0, 9) < 6) voxels.push_back({0, x, -6, z});
      if (random.integer(0, 9) < 3) voxels.push_back({0, x, 5, z});
    }
  }
  for (int z = 1; z < 5; ++z) voxels.push_back({0, 2, 1, z});
  return voxels;
}

// Distinct voxels of a cube around the origin, in no order.
inline Voxels random_cloud(int rows, int extent, uint64_t seed) {
  Random random(seed);
  std::set<Voxel> distinct;
  if (rows > extent * extent * extent) throw std::invalid_argument("the cube is too small");
  const auto draw = [&] {
    return static_cast<int32_t>(random.integer(0, extent - 1) - extent / 2);
  };
  while (static_cast<int>(distinct.size()) < rows) distinct.insert({0, draw(), draw(), draw()});
  Voxels voxels(distinct.begin(), distinct.end());
  random.shuffle(&voxels);
  return voxels;
}

// Voxels at the ends of the coordinates' range, where a sum wraps around. One axis stays short, as
// the extents in bricks may have 63 bits together.
inline Voxels extreme_cloud() {
  constexpr int32_t low = std::numeric_limits<int32_t>::min();
  constexpr int32_t high = std::numeric_limits<int32_t>::max();
  Voxels voxels;
  for (const int32_t batch : {high, high - 1}) {
    for (const int32_t x : {low, low + 1, high - 1, high}) {
      for (const int32_t y : {low, high - 1, high}) {
        for (const int32_t z : {high, high - 1}) voxels.push_back({batch, x, y, z});
      }
    }
  }
  return voxels;
}

// The coordinates that a text names:
//   empty, odd (one voxel), street, extreme, full:N (a cube of N^3), line:N (along x), shell:RES,
//   half:RES (a shell whose second half is in no order),
//   random:N:EXTENT[:SEED], gap:N (batch items 0 and 2 of 3), repeat:N (N rows, most voxels more
//   than once).
inline Voxels cloud(std::string_view text) {
  std::vector<int> numbers;
  std::string_view rest = text;
  const std::string_view kind = rest.substr(0, rest.find(':'));
  rest.remove_prefix(kind.size());
  while (!rest.empty()) {
    rest.remove_prefix(1);
    int number = 0;
    const auto end = std::from_chars(rest.data(), rest.data() + rest.size(), number).ptr;
    if (end == rest.data()) throw std::invalid_argument("no number in " + std::string(text));
    rest.remove_prefix(end - rest.data());
    numbers.push_back(number);
  }
  if (numbers.empty()) {
    if (kind == "empty") return {};
    if (kind == "odd") return {{0, 3, 5, 7}};
    if (kind == "street") return street_cloud();
    if (kind == "extreme") return extreme_cloud();
  } else if (numbers.size() == 1) {
    const int n = numbers[0];
    if (kind == "full") return full_cloud(n);
    if (kind == "shell") return shell_cloud(n);
    if (kind == "half") {
      Voxels ordered = shell_cloud(n);
      Voxels rest(ordered.begin() + ordered.size() / 2, ordered.end());
      Random("half").shuffle(&rest);
      std::copy(rest.begin(), rest.end(), ordered.begin() + ordered.size() / 2);
      return ordered;
    }
    Voxels voxels;
    for (int i = 0; i < n; ++i) voxels.push_back({0, i, 0, 0});
    if (kind == "line") return voxels;
    if (kind == "gap") {
      for (int i = 0; i < n; ++i) voxels[i] = {i % 2 * 2, i / 2 % 5, i / 10 % 5, i / 50};
      return voxels;
    }
    if (kind == "repeat") {
      Random random("repeat");
      const Voxels cube = full_cloud(n / 40 + 1);
      for (Voxel& v : voxels) v = random.pick(cube);
      return voxels;
    }
  } else if (kind == "random") {
    return random_cloud(numbers[0], numbers[1], numbers.size() > 2 ? numbers[2] : 0);
  }
  throw std::invalid_argument("no cloud is called " + std::string(text));
}

// i32 [n, 4]
inline Matrix coords_matrix(const Context& ctx, const Voxels& voxels) {
  Matrix matrix = make_matrix(ctx, static_cast<int64_t>(voxels.size()), 4, Dtype::i32);
  if (!voxels.empty()) std::memcpy(matrix.data, voxels.data(), voxels.size() * sizeof(Voxel));
  return matrix;
}

inline Voxels voxels_of(const MatrixRef& coords) {
  Voxels voxels(coords.rows);
  if (!voxels.empty()) std::memcpy(voxels.data(), coords.data, voxels.size() * sizeof(Voxel));
  return voxels;
}

}  // namespace voxgemm::test

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <map>

#include "support/clouds.h"
#include "voxgemm/error.h"
#include "voxgemm/kernel_map.h"

namespace voxgemm::test {

constexpr int32_t int32_min = std::numeric_limits<int32_t>::min();
constexpr int32_t int32_max = std::numeric_limits<int32_t>::max();

// Calls body(random) with seeds 0, 1, ... for two seconds, or until something failed.
template <class Body>
void for_two_seconds(const Body& body) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  for (uint64_t seed = 0; std::chrono::steady_clock::now() < end; ++seed) {
    SCOPED_TRACE(join("seed ", seed));
    Random random(seed);
    body(random);
    if (testing::Test::HasFailure()) return;
  }
}

// Of a contiguous matrix.
template <class T>
std::vector<T> elements(const MatrixRef& m) {
  return {m.as<T>(), m.as<T>() + m.rows * m.cols};
}

// A voxel or a place that int32 cannot hold.
using Place = std::array<int64_t, 4>;

inline Place place(const Voxel& v) { return {v[0], v[1], v[2], v[3]}; }

inline std::map<Place, int32_t> lowest_rows(const Voxels& voxels) {
  std::map<Place, int32_t> rows;
  for (const Voxel& v : voxels) rows.emplace(place(v), static_cast<int32_t>(&v - voxels.data()));
  return rows;
}

// At most `most` voxels: blobs around a few centres, which may be negative, at the ends of int32 or
// far apart on up to two axes; a few batch items; repeated voxels, some orders; sometimes hardly
// any voxel.
inline Voxels random_voxels(Random* random, int64_t most) {
  const int64_t rows = random->integer(0, random->integer(0, 9) == 0 ? 2 : most);
  const int64_t spread = random->integer(0, 12);
  const int64_t near_axis = random->integer(0, 2);
  const int64_t batches = random->integer(1, 3);
  const int64_t first_batch =
      random->integer(0, 3) == 0 ? int32_max - batches + 1 : random->integer(-3, 3);
  const int64_t kinds = random->integer(1, 4);
  std::vector<std::array<int64_t, 3>> centres(random->integer(1, 3));
  for (auto& centre : centres) {
    for (int axis = 0; axis < 3; ++axis) {
      const std::array<int64_t, 4> choices = {random->integer(-20, 20), int32_min, int32_max,
                                              random->integer(int32_min, int32_max)};
      centre[axis] = choices[axis == near_axis ? 0 : random->integer(0, kinds - 1)];
    }
  }
  Voxels voxels(rows);
  for (Voxel& v : voxels) {
    const auto& centre = random->pick(centres);
    v[0] = static_cast<int32_t>(first_batch + random->integer(0, batches - 1));
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t coordinate = centre[axis] + random->integer(-spread, spread);
      v[axis + 1] = static_cast<int32_t>(std::clamp<int64_t>(coordinate, int32_min, int32_max));
    }
  }
  const int64_t order = random->integer(0, 2);
  if (order == 0) return voxels;
  std::sort(voxels.begin(), voxels.end());
  if (order == 1) return voxels;
  voxels.erase(std::unique(voxels.begin(), voxels.end()), voxels.end());
  random->shuffle(&voxels);
  return voxels;
}

// Enough rows that several threads meet in the same bricks. Blobs that are far apart are found by
// hashing.
inline Voxels crowded_voxels(int64_t rows, int64_t distance) {
  Random random("crowded");
  Voxels voxels(rows);
  for (Voxel& v : voxels) {
    const int64_t blob = distance * random.integer(-3, 3);
    v = {static_cast<int32_t>(random.integer(0, 1)),
         static_cast<int32_t>(random.integer(0, 40) + blob),
         static_cast<int32_t>(random.integer(0, 30) - blob),
         static_cast<int32_t>(random.integer(-9, 20))};
  }
  return voxels;
}

inline Geometry random_geometry(Random* random, bool unit_stride) {
  Geometry geometry;
  const int64_t widest = random->integer(0, 9) == 0 ? 9 : 4;
  const bool cubic = random->integer(0, 1) == 0;
  for (int axis = 0; axis < 3; ++axis) {
    const auto draw = [&](Int3* values, int64_t low, int64_t high) {
      (*values)[axis] =
          axis > 0 && cubic ? (*values)[0] : static_cast<int32_t>(random->integer(low, high));
    };
    draw(&geometry.size, 1, widest);
    draw(&geometry.stride, 1, unit_stride ? 1 : 4);
    draw(&geometry.padding, 0, 4);
    draw(&geometry.dilation, 1, !cubic && random->integer(0, 3) == 0 ? 20 : 1);
  }
  return geometry;
}

// The first rows as text, for messages of failed tests.
inline std::string describe(const Voxels& voxels) {
  std::string text = join(voxels.size(), " rows:");
  for (size_t r = 0; r < voxels.size() && r < 40; ++r) {
    const Voxel& v = voxels[r];
    text += join(" (", v[0], " ", v[1], " ", v[2], " ", v[3], ")");
  }
  return text;
}

}  // namespace voxgemm::test

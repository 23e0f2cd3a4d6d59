// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <vector>

#include "support/run.h"

namespace voxgemm::test {

// One (in, out, tap) of a kernel map.
struct Pair {
  int64_t in;
  int64_t out;
  int tap;
};

// Straight from the relation in = out * stride - padding + tap * dilation, with nothing of the
// library's maps. Inverse: the same with the sides exchanged.
inline std::vector<Pair> brute_force_pairs(const Case& c) {
  using Place = std::array<int64_t, 4>;
  const Geometry& g = c.problem.geometry;
  const bool inverse = c.problem.operation == Operation::inverse;
  std::map<Place, int64_t> lowest;
  for (size_t row = 0; row < c.in.size(); ++row) {
    const Voxel& v = c.in[row];
    lowest.try_emplace({v[0], v[1], v[2], v[3]}, static_cast<int64_t>(row));
  }
  std::vector<Pair> pairs;
  for (size_t out = 0; out < c.out.size(); ++out) {
    for (int tap = 0; tap < g.taps(); ++tap) {
      const Int3 at = g.tap(tap);
      Place place = {c.out[out][0]};
      bool divides = true;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t coordinate = c.out[out][axis + 1];
        const int64_t shift = int64_t{at[axis]} * g.dilation[axis] - g.padding[axis];
        if (inverse) {
          divides = divides && (coordinate - shift) % g.stride[axis] == 0;
          place[axis + 1] = (coordinate - shift) / g.stride[axis];
        } else {
          place[axis + 1] = coordinate * g.stride[axis] + shift;
        }
      }
      const auto found = lowest.find(place);
      if (divides && found != lowest.end()) {
        pairs.push_back({found->second, static_cast<int64_t>(out), tap});
      }
    }
  }
  return pairs;
}

inline std::vector<double> brute_force(const Case& c, const Operands& operands) {
  const int64_t c_in = c.problem.c_in;
  const int64_t c_out = c.problem.c_out;
  const auto n_in = static_cast<int64_t>(c.in.size());
  const auto n_out = static_cast<int64_t>(c.out.size());
  std::vector<double> y(n_out * c_out);
  std::vector<double> dx(n_in * c_in);
  std::vector<double> dw(operands.w.size());
  for (int64_t i = 0; i < n_out * c_out; ++i) y[i] = operands.bias[i % c_out];
  for (const Pair& pair : brute_force_pairs(c)) {
    for (int64_t k = 0; k < c_in; ++k) {
      for (int64_t n = 0; n < c_out; ++n) {
        const int64_t weight = (pair.tap * c_in + k) * c_out + n;
        const int64_t in = pair.in * c_in + k;
        const int64_t out = pair.out * c_out + n;
        y[out] += operands.x[in] * operands.w[weight];
        dx[in] += operands.dy[out] * operands.w[weight];
        dw[weight] += operands.x[in] * operands.dy[out];
      }
    }
  }
  for (size_t i = 0; i < operands.residual.size(); ++i) {
    y[i] = std::max(0.0, y[i] + operands.residual[i]);
  }
  return c.problem.pass == Pass::forward ? y : c.problem.pass == Pass::grad_input ? dx : dw;
}

}  // namespace voxgemm::test

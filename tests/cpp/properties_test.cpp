// SPDX-License-Identifier: Apache-2.0
// What a convolution satisfies whatever its result: no reference here. Operands are small integers,
// so sums are exact in any order and all equalities are of bits.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "support/run.h"

namespace voxgemm::test {
namespace {

// Forward and gradients of a case by the kernels that a filter picks.
struct Results {
  std::vector<double> y;
  std::vector<double> dx;
  std::vector<double> dw;
};

Results results(const Case& c, const Operands& operands, const Filter& filter = {}) {
  const Dtype dtype = c.problem.dtype;
  return {run(context(), c.with(Pass::forward, dtype), filter, operands),
          run(context(), c.with(Pass::grad_input, dtype), filter, operands),
          run(context(), c.with(Pass::grad_weight, dtype), filter, operands)};
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// The rows of a [rows, cols] matrix in another order: row i is old row order[i].
std::vector<double> reordered(const std::vector<double>& values,
                              const std::vector<int64_t>& order) {
  const size_t cols = order.empty() ? 0 : values.size() / order.size();
  std::vector<double> result;
  for (const int64_t row : order) {
    result.insert(result.end(), values.begin() + row * cols, values.begin() + (row + 1) * cols);
  }
  return result;
}

class Layers : public ::testing::TestWithParam<std::string> {
 protected:
  Layers() : layer(make_case(context(), problem_text(Pass::forward, Dtype::f32, GetParam()))) {
    drawn = make_operands(layer, Fill::integers);
  }
  // The same layer on other coordinates: of `in` or, for an inverse one, of `out`.
  Voxels voxels() const {
    return layer.problem.operation == Operation::inverse ? layer.out : layer.in;
  }

  Case layer;
  Operands drawn;
};

INSTANTIATE_TEST_SUITE_P(List,
                         Layers,
                         ::testing::Values("subm3 5->7 random:200:8",
                                           "subm2 7->5 random:200:8",
                                           "subm3d2 16->5 shell:8",
                                           "subm5x3x1 5->7 street",
                                           "subm3 5->7 gap:200",
                                           "subm3 6->7 repeat:200",
                                           "subm2 6->7 repeat:200",
                                           "conv3s2p1 5->16 random:200:8",
                                           "conv2s2 7->5 gap:200",
                                           "conv4s3p2d2 5->7 random:200:8",
                                           "conv3s2p1 6->7 repeat:200",
                                           "inv3s2p1 16->5 random:200:8",
                                           "inv2s2 5->7 gap:200",
                                           "inv3s2p1 6->7 repeat:200"),
                         [](const auto& info) { return std::to_string(info.index); });

// <dy, conv(x)> = <grad_input(dy), x> = <grad_weight(x, dy), w>, for every search space.
TEST_P(Layers, GradientsAreAdjoint) {
  drawn.bias.assign(drawn.bias.size(), 0.0);
  std::vector<Filter> filters(1);
  for (int a = 0; a < algorithm_count; ++a) {
    filters.push_back({.algorithms = {static_cast<Algorithm>(a)}, .kernel = ""});
  }
  filters.push_back({.algorithms = {}, .kernel = "reference_cpu"});
  for (const Filter& filter : filters) {
    const Results r = results(layer, drawn, filter);
    const double forward = dot(r.y, drawn.dy);
    EXPECT_NE(forward, 0);
    EXPECT_EQ(forward, dot(r.dx, drawn.x));
    EXPECT_EQ(forward, dot(r.dw, drawn.w));
  }
}

TEST_P(Layers, PermutedRowsPermuteTheResults) {
  Random random("permute");
  // Repeated voxels are looked up at their lowest row, which a permutation changes.
  if (!layer.map.in_first.empty() || !layer.map.out_first.empty())
    GTEST_SKIP() << "repeated voxels";
  const auto shuffled = [&](size_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    random.shuffle(&order);
    return order;
  };
  const std::vector<int64_t> in_order = shuffled(layer.in.size());
  const bool same_side = layer.problem.operation == Operation::submanifold;
  const std::vector<int64_t> out_order = same_side ? in_order : shuffled(layer.out.size());
  Case other = layer;
  for (size_t i = 0; i < layer.in.size(); ++i) other.in[i] = layer.in[in_order[i]];
  for (size_t i = 0; i < layer.out.size(); ++i) other.out[i] = layer.out[out_order[i]];
  const Matrix in = coords_matrix(context(), other.in);
  const Matrix out = coords_matrix(context(), other.out);
  const Geometry& geometry = layer.problem.geometry;
  if (same_side) {
    other.map = build_submanifold_map(context(), in, geometry);
  } else if (layer.problem.operation == Operation::strided) {
    other.map = build_kernel_map(context(), in, out, geometry);
  } else {
    other.map = transpose(context(), build_kernel_map(context(), out, in, geometry));
  }
  Operands permuted = drawn;
  permuted.x = reordered(drawn.x, in_order);
  permuted.dy = reordered(drawn.dy, out_order);
  const Results before = results(layer, drawn);
  const Results after = results(other, permuted);
  EXPECT_EQ(after.y, reordered(before.y, out_order));
  EXPECT_EQ(after.dx, reordered(before.dx, in_order));
  EXPECT_EQ(after.dw, before.dw);
}

TEST_P(Layers, TranslationByAMultipleOfTheStrideChangesNothing) {
  Voxels moved = voxels();
  for (Voxel& v : moved) {
    v[0] += 5;
    for (int axis = 0; axis < 3; ++axis) {
      v[axis + 1] += layer.problem.geometry.stride[axis] * (axis == 1 ? -70001 : 12345);
    }
  }
  const Case other = make_case(context(), layer.problem, moved);
  const Results before = results(layer, drawn);
  const Results after = results(other, drawn);
  EXPECT_EQ(after.y, before.y);
  EXPECT_EQ(after.dx, before.dx);
  EXPECT_EQ(after.dw, before.dw);
}

void expect_equal_tables(const KernelMap& a, const KernelMap& b) {
  EXPECT_EQ(a.geometry, b.geometry);
  EXPECT_EQ(a.n_in, b.n_in);
  EXPECT_EQ(a.n_out, b.n_out);
  EXPECT_EQ(a.symmetric, b.symmetric);
  EXPECT_EQ(a.is_transposed, b.is_transposed);
  const auto expect_equal = [](const MatrixRef& m, const MatrixRef& n, const char* what) {
    ASSERT_EQ(m.rows * m.cols, n.rows * n.cols) << what;
    for (int64_t r = 0; r < m.rows; ++r) {
      EXPECT_EQ(
          std::memcmp(m.row<char>(0) + r * m.stride * size_of(m.dtype),
                      n.row<char>(0) + r * n.stride * size_of(n.dtype), m.cols * size_of(m.dtype)),
          0)
          << what << ", row " << r;
    }
  };
  expect_equal(a.neighbours, b.neighbours, "neighbours");
  expect_equal(a.pairs_per_tap, b.pairs_per_tap, "pairs_per_tap");
  expect_equal(a.in_first, b.in_first, "in_first");
  expect_equal(a.out_first, b.out_first, "out_first");
}

TEST_P(Layers, TransposingTwiceGivesTheMapBack) {
  const KernelMap once = transpose(context(), layer.map);
  EXPECT_EQ(once.n_in, layer.map.n_out);
  EXPECT_EQ(once.n_out, layer.map.n_in);
  EXPECT_NE(once.is_transposed, layer.map.is_transposed);
  EXPECT_EQ(once.pairs(context()) > 0, layer.map.pairs(context()) > 0);
  expect_equal_tables(transpose(context(), once), layer.map);
}

// Every batch item alone gives the rows that it has in the whole; only weight gradients are sums
// over items.
TEST_P(Layers, BatchItemsDoNotMix) {
  Voxels all;
  std::vector<size_t> item_rows;
  for (int item = 0; item < 3; ++item) {
    for (Voxel v : voxels()) {
      v[0] = item * 3;
      // Items overlap in space and differ in it.
      if (item == 1 && v[1] % 2 != 0) continue;
      all.push_back(v);
    }
    item_rows.push_back(all.size());
  }
  const auto item_case = [&](int item) {
    const size_t first = item == 0 ? 0 : item_rows[item - 1];
    return make_case(context(), layer.problem,
                     Voxels(all.begin() + first, all.begin() + item_rows[item]));
  };
  const Case whole = make_case(context(), layer.problem, all);
  const Operands operands = make_operands(whole, Fill::integers);
  const Results expected = results(whole, operands);
  Results joined;
  size_t in = 0;
  size_t out = 0;
  for (int item = 0; item < 3; ++item) {
    const Case alone = item_case(item);
    const auto piece = [](const std::vector<double>& values, size_t* at, size_t count) {
      const auto first = values.begin() + static_cast<int64_t>(*at);
      *at += count;
      return std::vector<double>(first, first + static_cast<int64_t>(count));
    };
    Operands part = operands;
    part.x = piece(operands.x, &in, alone.in.size() * layer.problem.c_in);
    part.dy = piece(operands.dy, &out, alone.out.size() * layer.problem.c_out);
    const Results r = results(alone, part);
    joined.y.insert(joined.y.end(), r.y.begin(), r.y.end());
    joined.dx.insert(joined.dx.end(), r.dx.begin(), r.dx.end());
    joined.dw.resize(r.dw.size());
    for (size_t i = 0; i < r.dw.size(); ++i) joined.dw[i] += r.dw[i];
  }
  EXPECT_EQ(joined.y, expected.y);
  EXPECT_EQ(joined.dx, expected.dx);
  EXPECT_EQ(joined.dw, expected.dw);
}

// conv(a x1 + x2) = a conv(x1) + conv(x2), bias apart.
TEST_P(Layers, IsLinear) {
  drawn.bias.assign(drawn.bias.size(), 0.0);
  Operands second = drawn;
  Operands sum = drawn;
  Random random("linear");
  second.x = draw(static_cast<int64_t>(drawn.x.size()), Fill::integers, Dtype::f32, &random);
  for (size_t i = 0; i < sum.x.size(); ++i) sum.x[i] = 2 * drawn.x[i] + second.x[i];
  const std::vector<double> a = run(context(), layer, Filter{}, drawn);
  const std::vector<double> b = run(context(), layer, Filter{}, second);
  const std::vector<double> y = run(context(), layer, Filter{}, sum);
  for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(y[i], 2 * a[i] + b[i]);
}

// The rows of a repeated voxel: equal outputs, and an input gradient at the lowest one only.
TEST(Repeated, EqualOutputsAndOneGradient) {
  const Case c = make_case(context(), "forward f32 subm3 6->7 repeat:200");
  const Operands operands = make_operands(c, Fill::integers);
  const Results r = results(c, operands);
  int64_t repeats = 0;
  for (int64_t row = 0; row < c.map.n_in; ++row) {
    const int64_t first = c.map.in_first.as<int32_t>()[row];
    ASSERT_LE(first, row);
    ASSERT_EQ(c.in[first], c.in[row]);
    if (first == row) continue;
    ++repeats;
    for (int n = 0; n < 7; ++n) EXPECT_EQ(r.y[row * 7 + n], r.y[first * 7 + n]);
    for (int k = 0; k < 6; ++k) EXPECT_EQ(r.dx[row * 6 + k], 0);
  }
  EXPECT_GT(repeats, 50);
}

}  // namespace
}  // namespace voxgemm::test

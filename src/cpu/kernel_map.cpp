// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "cpu/voxel_index.h"

namespace voxgemm {

namespace cpu {
namespace {

// The taps of one axis as they fall into bricks. The voxel under tap 0 has one of 8 places in its
// brick, and the place alone decides which bricks the taps need, counted from that brick, and where
// in them they are.
struct AxisTaps {
  // Taps side by side in one brick.
  struct Run {
    int64_t slot;   // of the brick among those the axis needs
    int64_t place;  // of the first tap, 0 to 7
    int64_t taps;
  };
  std::array<std::vector<int64_t>, 8> bricks;
  std::array<std::vector<Run>, 8> runs;
  int slots = 0;  // most bricks of a place

  AxisTaps(int size, int64_t dilation) {
    for (int place = 0; place < 8; ++place) {
      std::vector<int64_t>& needed = bricks[place];
      for (int tap = 0; tap < size; ++tap) {
        const int64_t offset = place + tap * dilation;
        const bool same_brick = !needed.empty() && needed.back() == offset >> 3;
        if (same_brick && dilation == 1) {
          ++runs[place].back().taps;
          continue;
        }
        if (!same_brick) needed.push_back(offset >> 3);
        runs[place].push_back({static_cast<int64_t>(needed.size()) - 1, offset & 7, 1});
      }
      slots = std::max(slots, static_cast<int>(needed.size()));
    }
  }
};

// Four numbers of 32 bits, one instruction for all.
using Lanes = int32_t __attribute__((vector_size(16)));

Lanes all_lanes(int32_t value) { return Lanes{value, value, value, value}; }
Lanes load(const std::array<int32_t, 4>& values) {
  Lanes lanes;
  std::memcpy(&lanes, values.data(), sizeof(lanes));
  return lanes;
}

// How the ranks of `size` taps side by side follow from those of the first tap of each brick: by
// the number of taps in the first brick, and by the taps that are present as bits.
template <int size>
struct LineTable {
  struct Line {
    std::array<int32_t, 4> before = {};  // present taps of the same brick before each tap
    std::array<int32_t, 4> keep = {};    // all ones where the tap is present
  };
  std::array<std::array<Line, 1 << size>, size + 1> lines = {};
  std::array<std::array<int32_t, 4>, size + 1> beyond =
      {};  // all ones for taps of the second brick

  constexpr LineTable() {
    for (int inside = 1; inside <= size; ++inside) {
      for (int tap = 0; tap < size; ++tap) {
        beyond[inside][tap] = tap >= inside ? -1 : 0;
        for (int present = 0; present < 1 << size; ++present) {
          Line& line = lines[inside][present];
          line.keep[tap] = (present >> tap & 1) != 0 ? -1 : 0;
          for (int before = tap >= inside ? inside : 0; before < tap; ++before) {
            line.before[tap] += present >> before & 1;
          }
        }
      }
    }
  }
};

// The columns of a kernel map for a block of output rows, in three steps that each touch one kind
// of memory for all rows of the block, so that the misses of many rows overlap: which bricks a row
// needs, which ranks its taps have, which rows these are.
class Walker {
 public:
  // Makes the buffers of a 3^3 kernel 16 KB: they stay in a first-level cache.
  static constexpr int block_rows = 64;

  Walker(const BrickIndex& in, const Geometry& geometry, const std::array<AxisTaps, 3>& axes)
      : set_(in.bricks()),
        row_of_rank_(in.row_of_rank()),
        geometry_(geometry),
        axes_(axes),
        slots_(axes_[0].slots * axes_[1].slots * axes_[2].slots),
        bricks_(static_cast<size_t>(slots_) * block_rows),
        keys_(bricks_.size()),
        key_slots_(bricks_.size()),
        found_(bricks_.size()),
        rank_stride_((geometry.taps() + 4) | 1),
        ranks_(static_cast<size_t>(rank_stride_) * block_rows),
        pairs_(static_cast<size_t>(geometry.taps()), 0) {
    for (int axis = 0; axis < 3; ++axis) {
      stride_[axis] = geometry.stride[axis];
      shift_[axis] = geometry.padding[axis] + set_.box().origin[1 + axis];
    }
    const bool cube = geometry.size == Int3{geometry.size[0], geometry.size[0], geometry.size[0]};
    if (cube && geometry.dilation == Int3{1, 1, 1}) near_size_ = geometry.size[0];
  }

  // Writes the neighbours of output voxels [rows, 4] to columns `first` and on of the map.
  void walk(const int32_t* out, int rows, int64_t first, const MatrixRef& neighbours) {
    if (near_size_ == 3) {
      fetch<3>(out, rows);
      for (int i = 0; i < rows; ++i) rank_near<3>(i);
    } else if (near_size_ == 2) {
      fetch<2>(out, rows);
      for (int i = 0; i < rows; ++i) rank_near<2>(i);
    } else {
      fetch<0>(out, rows);
      for (int i = 0; i < rows; ++i) rank(i);
    }
    const int taps = geometry_.taps();
    const int64_t stride = rank_stride_;
    const int32_t* row_of_rank = row_of_rank_;
    for (int tap = 0; tap < taps; ++tap) {
      const int32_t* rank = ranks_.data() + tap;
      auto* column = neighbours.row<int32_t>(tap) + first;
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) column[i] = row_of_rank[rank[i * stride]];
    }
    int32_t* pairs = pairs_.data();
    for (int i = 0; i < rows; ++i) {
      const int32_t* rank = ranks_.data() + i * stride;
      for (int tap = 0; tap < taps; ++tap) pairs[tap] += rank[tap] != 0 ? 1 : 0;
    }
  }

  // [taps]: neighbours that all walks found.
  const std::vector<int32_t>& pairs() const { return pairs_; }

 private:
  using Places = std::array<int64_t, 3>;

  // The bricks that the taps of output voxels [rows, 4] fall into. size: of a cube without
  // dilation, which needs one or two bricks on an axis, or 0.
  template <int size>
  void fetch(const int32_t* out, int rows) {
    // Copies, since the stores below could change the originals for all the compiler knows.
    const CellBox box = set_.box();
    const std::array<int, 3> slots = {axes_[0].slots, axes_[1].slots, axes_[2].slots};
    uint64_t* keys = keys_.data();
    int* key_slots = key_slots_.data();
    const auto bricks = [&](int axis, int64_t place) -> int64_t {
      if (size > 0) return place + size > 8 ? 2 : 1;
      return static_cast<int64_t>(axes_[axis].bricks[place].size());
    };
    int count = 0;
    for (int i = 0; i < rows; ++i, out += 4) {
      std::array<int64_t, 3> corner;
      Places& places = places_[i];
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t voxel = out[1 + axis] * stride_[axis] - shift_[axis];
        corner[axis] = voxel >> 3;
        places[axis] = voxel & 7;
      }
      const Places ends = {bricks(0, places[0]), bricks(1, places[1]), bricks(2, places[2])};
      const auto cell = [&](int axis, int64_t slot) {
        const int64_t offset = size > 0 ? slot : axes_[axis].bricks[places[axis]][slot];
        return static_cast<uint64_t>(corner[axis] + offset);
      };
      const auto batch = static_cast<uint64_t>(out[0] - box.origin[0]);
      for (int x = 0; x < ends[0]; ++x) {
        for (int y = 0; y < ends[1]; ++y) {
          for (int z = 0; z < ends[2]; ++z) {
            keys[count] = box.key({batch, cell(0, x), cell(1, y), cell(2, z)});
            key_slots[count++] = ((i * slots[0] + x) * slots[1] + y) * slots[2] + z;
          }
        }
      }
    }
    set_.at(keys, count, found_.data());
    for (int j = 0; j < count; ++j) bricks_[key_slots[j]] = found_[j];
  }

  // Ranks plus one, 0 where absent, of a kernel of `size`^3 taps without dilation.
  template <int size>
  void rank_near(int i) {
    static constexpr LineTable<size> table;
    const Places start = places_[i];
    const Brick* const* bricks = bricks_.data() + static_cast<size_t>(i) * 8;
    int32_t* ranks = ranks_.data() + i * rank_stride_;
    const int64_t inside =
        std::min<int64_t>(8 - start[2], size);  // taps of a line in its first brick
    for (int dx = 0; dx < size; ++dx) {
      const int64_t word = (start[0] + dx) & 7;
      for (int dy = 0; dy < size; ++dy) {
        const int64_t byte = 8 * ((start[1] + dy) & 7);
        const Brick* const* brick =
            bricks + 4 * ((start[0] + dx) >> 3) + 2 * ((start[1] + dy) >> 3);
        const int64_t bit = byte + start[2];
        uint64_t present = brick[0]->mask[word] >> bit;
        Lanes rank = all_lanes(brick[0]->rank_of(word, bit) + 1);
        if (inside < size) {
          const Lanes beyond = load(table.beyond[inside]);
          present &= (1U << inside) - 1;
          present |= brick[1]->mask[word] >> byte << inside;
          rank = (rank & ~beyond) | (all_lanes(brick[1]->rank_of(word, byte) + 1) & beyond);
        }
        const auto& line = table.lines[inside][present & ((1U << size) - 1)];
        rank = (rank + load(line.before)) & load(line.keep);
        std::memcpy(ranks, &rank, sizeof(rank));
        ranks += size;
      }
    }
  }

  // The same for any kernel.
  void rank(int i) {
    const Places start = places_[i];
    const Brick* const* bricks = bricks_.data() + static_cast<size_t>(i) * slots_;
    int32_t* ranks = ranks_.data() + i * rank_stride_;
    for (const AxisTaps::Run& x : axes_[0].runs[start[0]]) {
      for (int64_t word = x.place; word < x.place + x.taps; ++word) {
        for (const AxisTaps::Run& y : axes_[1].runs[start[1]]) {
          const Brick* const* line = bricks + (x.slot * axes_[1].slots + y.slot) * axes_[2].slots;
          for (int64_t dy = 0; dy < y.taps; ++dy) {
            for (const AxisTaps::Run& z : axes_[2].runs[start[2]]) {
              const Brick& brick = *line[z.slot];
              const int64_t bit = 8 * (y.place + dy) + z.place;
              const uint64_t present = brick.mask[word] >> bit;
              int32_t next = brick.rank_of(word, bit) + 1;
              for (int64_t dz = 0; dz < z.taps; ++dz) {
                const auto one = static_cast<int32_t>(present >> dz & 1);
                *ranks++ = next & -one;
                next += one;
              }
            }
          }
        }
      }
    }
  }

  const BrickSet& set_;
  const int32_t* row_of_rank_;
  const Geometry& geometry_;
  const std::array<AxisTaps, 3>& axes_;
  int slots_;
  int near_size_ = 0;  // of a cube without dilation
  std::array<int64_t, 3> stride_ = {};
  std::array<int64_t, 3> shift_ = {};
  std::array<Places, block_rows> places_;
  std::vector<const Brick*> bricks_;  // [block_rows, slots]
  // The ones that are needed: key, place in bricks_, what was found.
  std::vector<uint64_t> keys_;
  std::vector<int> key_slots_;
  std::vector<const Brick*> found_;
  int64_t rank_stride_;
  std::vector<int32_t>
      ranks_;  // [block_rows, rank_stride], of them taps; a rank counts from 1, 0 = absent
  std::vector<int32_t> pairs_;
};

// Neighbours and pair counts of a map whose geometry is set.
void fill(const Context& ctx, const BrickIndex& in, const MatrixRef& out_coords, KernelMap* map) {
  const int taps = map->taps();
  auto* pairs = map->pairs_per_tap.as<int64_t>();
  std::fill_n(pairs, taps, 0);
  const Geometry& g = map->geometry;
  const std::array<AxisTaps, 3> axes = {AxisTaps(g.size[0], g.dilation[0]),
                                        AxisTaps(g.size[1], g.dilation[1]),
                                        AxisTaps(g.size[2], g.dilation[2])};
  // About 50 us with 3^3 taps: long against the hand-out of a task.
  constexpr int64_t task_rows = 1024;
  for_pieces(ctx, map->n_out, task_rows, [&](int64_t first, int64_t last) {
    Walker walker(in, g, axes);
    for (int64_t begin = first; begin < last; begin += Walker::block_rows) {
      const auto rows = static_cast<int>(std::min<int64_t>(Walker::block_rows, last - begin));
      walker.walk(out_coords.as<int32_t>() + 4 * begin, rows, begin, map->neighbours);
    }
    for (int tap = 0; tap < taps; ++tap) {
      std::atomic_ref<int64_t>(pairs[tap])
          .fetch_add(walker.pairs()[tap], std::memory_order_relaxed);
    }
  });
}

// Rows that ascend strictly are distinct: what output_coords gives needs no index to know it.
// Behind them may be padding.
bool ascends(const Context& ctx, const MatrixRef& coords) {
  std::atomic<bool> holds = true;
  for_pieces(ctx, coords.rows, rows_per_task, [&](int64_t first, int64_t last) {
    const auto* c = coords.as<int32_t>();
    for (int64_t r = std::max<int64_t>(first, 1); r < last; ++r) {
      if (c[4 * r] == padding_batch) continue;
      if (c[4 * (r - 1)] == padding_batch) holds = false;
      if (!std::lexicographical_compare(c + 4 * (r - 1), c + 4 * r, c + 4 * r, c + 4 * (r + 1))) {
        holds = false;
        return;
      }
    }
  });
  return holds;
}

void count_pairs(KernelMap* map, int tap) {
  const auto* column = map->neighbours.row<int32_t>(tap);
  map->pairs_per_tap.as<int64_t>()[tap] =
      std::count_if(column, column + map->n_out, [](int32_t row) { return row >= 0; });
}

}  // namespace

void fill_submanifold_map(const Context& ctx,
                          const VoxelIndex::State* index,
                          const MatrixRef& coords,
                          KernelMap* map,
                          int64_t*) {
  const auto own = index == nullptr ? make_index(ctx, coords) : nullptr;
  const auto& bricks = static_cast<const BrickIndex&>(index == nullptr ? *own : *index);
  fill(ctx, bricks, coords, map);
  map->in_first = map->out_first = bricks.first_rows(ctx, coords);
}

void fill_kernel_map(const Context& ctx,
                     const MatrixRef& in_coords,
                     const MatrixRef& out_coords,
                     KernelMap* map,
                     int64_t*) {
  const BrickIndex in(ctx, in_coords);
  fill(ctx, in, out_coords, map);
  map->in_first = in.first_rows(ctx, in_coords);
  if (!ascends(ctx, out_coords)) {
    map->out_first = BrickIndex(ctx, out_coords).first_rows(ctx, out_coords);
  }
}

void fill_transposed(const Context& ctx, const KernelMap& map, KernelMap* result) {
  const auto* in_first = map.in_first.as<int32_t>();    // [n_in] or null
  const auto* out_first = map.out_first.as<int32_t>();  // [n_out] or null
  parallel_for(ctx, map.taps(), [&](int64_t task, int) {
    const int tap = static_cast<int>(task);
    auto* column = result->neighbours.row<int32_t>(tap);
    if (map.symmetric) {
      std::copy_n(map.neighbours.row<int32_t>(map.geometry.mirrored(tap)), map.n_out, column);
      result->pairs_per_tap.as<int64_t>()[tap] =
          map.pairs_per_tap.as<int64_t>()[map.geometry.mirrored(tap)];
      return;
    }
    const auto* neighbours = map.neighbours.row<int32_t>(tap);
    std::fill_n(column, map.n_in, -1);
    for (int64_t out = 0; out < map.n_out; ++out) {
      const bool lowest = out_first == nullptr || out_first[out] == out;
      if (lowest && neighbours[out] >= 0) column[neighbours[out]] = static_cast<int32_t>(out);
    }
    for (int64_t in = 0; in_first != nullptr && in < map.n_in; ++in) {
      column[in] = column[in_first[in]];
    }
    count_pairs(result, tap);
  });
}

}  // namespace cpu
}  // namespace voxgemm

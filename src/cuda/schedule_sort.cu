// SPDX-License-Identifier: Apache-2.0
//
// Sorts the rows of every segment by the Gray ranks of their masks, stable: a radix sort with
// digits of at most 9 bits, one launch a digit. 27 taps in one group are three launches, 9 taps of
// three groups one.
//
//   write_ranks  a thread a row: Gray ranks, of the masks that the map came with, else of its
//                table, which takes 26 us of memory for 1.03 M rows. Each block of threads stays in
//                one segment and adds its counts of every digit's values to the segment's.
//   sort_digit   a block of threads sorts 1024, 2048 or 4096 positions by one digit (the toolkit's
//                ranks) and writes them out. The rows of a digit's value go behind those of lower
//                values of the segment (from the counts) and of earlier blocks of the segment. For
//                the latter every block publishes its counts, a word for each value, and then the
//                sums with all blocks before it:
//                  0                   nothing yet
//                  1 + count           of this block alone
//                  top bit | sum       of this block and all before
//                and looks back from its own word, 8 words at a time, until it meets a sum. Blocks
//                are numbered by a ticket, so those before are running or done: it always ends.
//
// A segment of one block needs no counts. Positions and blocks have 31-bit numbers, so a sum leaves
// the top bit free.
//
// 27 bits of 1.03 M rows take 55 us on an H200, 17 a digit and 21 the first. The toolkit's sort
// takes 86, needs the segment's number in the key, and with it sometimes keys of 64 bits. Lost: 32
// words at a time in the look back, 24 us a digit; lanes of write_ranks that find each other and
// count as one, 26 us instead of 14; ranks and all digits of a segment by one cluster of 16 blocks,
// the schedule 39 us instead of 35 (64160 rows).
#include <algorithm>
#include <cub/block/block_radix_rank.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/schedule_cut.cuh"

namespace voxgemm::cuda {
namespace {

constexpr int most_digit_bits = 9;
constexpr uint32_t most_bins = 1 << most_digit_bits;
constexpr int sort_threads = most_bins;  // one a value of the digit
constexpr int most_digits = 4;           // of 32 bits

struct Digits {
  int count;
  int bits;  // of each

  explicit Digits(int key_bits)
      : count(static_cast<int>(ceil_div(key_bits, most_digit_bits))),
        bits(static_cast<int>(ceil_div(key_bits, count))) {}
  __host__ __device__ uint32_t bins() const { return 1U << bits; }
  __device__ uint32_t value(uint32_t rank, int digit) const {
    return rank >> (digit * bits) & (bins() - 1);
  }
};

// The place of a mask in the reflected Gray code.
__device__ uint32_t gray_rank(uint32_t mask) {
  for (int shift = 1; shift < 32; shift *= 2) mask ^= mask >> shift;
  return mask;
}

__device__ uint32_t find_mask(const Neighbours& neighbours,
                              uint32_t first_tap,
                              uint32_t taps,
                              uint32_t row) {
  if (neighbours.masks != nullptr) {
    const uint32_t all = neighbours.masks[row] >> first_tap;
    return taps < 32 ? all & ((1U << taps) - 1) : all;
  }
  // Loads on their way at once: half of 27 taps, so that two groups take one batch.
  constexpr uint32_t batch = 14;
  uint32_t mask = 0;
  for (uint32_t first = 0; first < taps; first += batch) {
#pragma unroll
    for (uint32_t tap = first; tap < first + batch; ++tap) {
      const int64_t at = (first_tap + tap) * neighbours.stride + row;
      if ((tap < taps ? neighbours.data[at] : -1) >= 0) mask |= 1U << tap;
    }
  }
  return mask;
}

constexpr int rank_threads = 512;
constexpr uint32_t ranks_at_once = 4;  // of a thread

struct Ranks {
  uint32_t* ranks;   // [positions]
  uint32_t* counts;  // [segments][digits][bins], zero before, or null
};

// A block of threads: a strip of a segment.
__global__ void __launch_bounds__(rank_threads)
    write_ranks(Cut cut, Grain strip, Digits digits, Neighbours neighbours, Ranks out) {
  __shared__ uint32_t histogram[most_digits * most_bins];
  // The last rows first: those that the table's writer left in the cache.
  const Part part = cut.part(gridDim.x - 1 - blockIdx.x, strip);
  const uint32_t size = digits.count * digits.bins();
  for (uint32_t i = threadIdx.x; i < size; i += rank_threads) histogram[i] = 0;
  __syncthreads();
  const uint32_t first = part.item * strip.rows;
  const uint32_t last = min(part.rows, first + strip.rows);
  const uint32_t first_row = cut.first_row(part);
  const uint32_t first_tap = cut.group_begin(part.group);
  const uint32_t taps = cut.group_begin(part.group + 1) - first_tap;
  uint32_t* ranks = out.ranks + cut.first_position(part);
  for (uint32_t begin = first + threadIdx.x; begin < last; begin += ranks_at_once * rank_threads) {
    uint32_t masks[ranks_at_once] = {};
#pragma unroll
    for (uint32_t n = 0; n < ranks_at_once; ++n) {
      const uint32_t i = begin + n * rank_threads;
      if (i < last) masks[n] = find_mask(neighbours, first_tap, taps, first_row + i);
    }
#pragma unroll
    for (uint32_t n = 0; n < ranks_at_once; ++n) {
      const uint32_t i = begin + n * rank_threads;
      if (i >= last) break;
      const uint32_t rank = gray_rank(masks[n]);
      ranks[i] = rank;
      if (cut.line > 1) ranks[i] |= neighbours.masks[first_row + i] & Neighbours::steady_bit;
      for (int digit = 0; out.counts != nullptr && digit < digits.count; ++digit) {
        atomicAdd(&histogram[digit * digits.bins() + digits.value(rank, digit)], 1U);
      }
    }
  }
  if (out.counts == nullptr) return;
  __syncthreads();
  uint32_t* counts = out.counts + cut.segment_number(part) * size;
  for (uint32_t i = threadIdx.x; i < size; i += rank_threads) {
    if (histogram[i] != 0) atomicAdd(&counts[i], histogram[i]);
  }
}

struct SortPass {
  const uint32_t* ranks;  // [positions]
  const uint32_t* rows;   // [positions], or null: ascending in every segment
  uint32_t* sorted_ranks;
  uint32_t* sorted_rows;
  const uint32_t* counts;  // of write_ranks, or null
  uint32_t* words;         // [blocks][bins], zero before
  uint32_t* ticket;        // zero before
  int digit;
};

constexpr uint32_t is_sum = 1U << 31;

// What the `blocks` blocks before this one published, `step` words apart, adds up to. The first of
// a segment publishes a sum.
__device__ uint32_t look_back(const volatile uint32_t* own, int64_t step, uint32_t blocks) {
  constexpr uint32_t window = 8;
  uint32_t sum = 0;
  while (true) {
    uint32_t words[window];
#pragma unroll
    for (uint32_t i = 0; i < window; ++i) words[i] = i < blocks ? own[-(i + int64_t{1}) * step] : 0;
#pragma unroll
    for (uint32_t i = 0; i < window && words[i] != 0; ++i) {
      if ((words[i] & is_sum) != 0) return sum + (words[i] & ~is_sum);
      sum += words[i] - 1;
      own -= step;
      --blocks;
    }
  }
}

// Behind the last row of a segment positions have the highest value and come last: nothing depends
// on them.
template <int rounds>
__global__ void __launch_bounds__(sort_threads, blocks_here(2))
    sort_digit(Cut cut, Grain grain, Digits digits, SortPass pass) {
  using Rank = cub::BlockRadixRankMatchEarlyCounts<sort_threads, most_digit_bits, false>;
  using Scan = cub::BlockScan<uint32_t, sort_threads, cub::BLOCK_SCAN_WARP_SCANS>;
  constexpr uint32_t block_rows = sort_threads * rounds;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Rank::TempStorage rank;
    uint2 exchanged[block_rows];  // rank, row
  } shared;
  __shared__ uint32_t targets[most_bins];  // what leads from a place in the block to the position
  __shared__ uint32_t number;
  if (threadIdx.x == 0) number = atomicAdd(pass.ticket, 1U);
  __syncthreads();
  const Part part = cut.part(number, grain);
  const uint32_t begin = part.item * block_rows;
  const uint32_t first = cut.first_position(part) + begin;
  const uint32_t count = min(block_rows, part.rows - begin);
  uint32_t ranks[rounds];
  uint32_t rows[rounds];
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const uint32_t offset = threadIdx.x / 32 * (32 * rounds) + i * 32 + threadIdx.x % 32;
    const bool used = offset < count;
    ranks[i] = used ? pass.ranks[first + offset] : 0xffffffff;
    rows[i] = cut.first_row(part) + begin + offset;
    if (pass.rows != nullptr && used) rows[i] = pass.rows[first + offset];
  }

  const uint32_t value = threadIdx.x;
  const bool publishes = part.items > 1 && value < digits.bins();
  uint32_t before = 0;  // of the segment's rows, those of lower values and of earlier blocks
  if (part.items > 1 && part.item == 0) {
    const int64_t counts = cut.segment_number(part) * digits.count + pass.digit;
    if (publishes) before = pass.counts[counts * digits.bins() + value];
    Scan(shared.scan).ExclusiveSum(before, before);
    __syncthreads();
  }
  volatile uint32_t* word = pass.words + static_cast<int64_t>(number) * digits.bins() + value;
  uint32_t in_block = 0;
  const auto publish = [&](int(&counts)[1]) {
    in_block = counts[0];
    if (publishes) *word = part.item == 0 ? is_sum | (before + in_block) : 1 + in_block;
  };
  int places[rounds];
  int start[1];
  const cub::BFEDigitExtractor<uint32_t> digit(pass.digit * digits.bits, digits.bits);
  Rank(shared.rank).RankKeys(ranks, places, digit, start, publish);
  if (publishes && part.item > 0) {
    before = look_back(word, digits.bins(), part.item);
    *word = is_sum | (before + in_block);
  }
  targets[value] = first;
  if (publishes) targets[value] += before - begin - start[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) shared.exchanged[places[i]] = make_uint2(ranks[i], rows[i]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const uint32_t place = i * sort_threads + threadIdx.x;
    if (place >= count) break;
    const uint2 item = shared.exchanged[place];
    const uint32_t position = targets[digits.value(item.x, pass.digit)] + place;
    pass.sorted_ranks[position] = item.x;
    pass.sorted_rows[position] = item.y;
  }
}

}  // namespace

SortedRows sort_rows(const Context& ctx,
                     const Cut& cut,
                     const Neighbours& neighbours,
                     uint32_t* rows) {
  const int64_t positions = int64_t{cut.rows} * cut.groups;
  const Digits digits(cut.bits());
  // Rows a thread: as few as leave no multiprocessor two blocks.
  int rounds = 8;
  while (rounds > 2 && cut.items(cut.grain(sort_threads * rounds / 2)) <= multiprocessors(ctx)) {
    rounds /= 2;
  }
  const auto sort_digits = rounds == 8   ? sort_digit<8>
                           : rounds == 4 ? sort_digit<4>
                                         : sort_digit<2>;
  const Grain block = cut.grain(sort_threads * rounds);
  const int64_t blocks = cut.items(block);
  // A segment of one block of threads needs none.
  const int64_t words = block.whole > 1 ? digits.count * digits.bins() : 0;
  SortedRows result;
  uint32_t* tickets = nullptr;
  uint32_t* counts = nullptr;
  uint32_t* sums = nullptr;
  uint32_t* ranks[2] = {};
  uint32_t* spare = nullptr;
  result.memory =
      make_room(ctx, Room{&tickets, most_digits + 1}, Room{&counts, cut.segments() * words},
                Room{&sums, blocks * words}, Room{&ranks[0], positions}, Room{&ranks[1], positions},
                Room{&spare, digits.count > 1 ? positions : 0});
  fill_bytes(ctx, tickets, 0, sizeof(uint32_t) * (ranks[0] - tickets));
  if (words == 0) counts = nullptr;
  // Rows of a block of threads: two blocks a multiprocessor, as each clears and adds up its counts.
  const int64_t rows_each = ceil_div(cut.rows, int64_t{rank_threads} * 2 * multiprocessors(ctx));
  const Grain strip = cut.grain(rank_threads * std::clamp<int64_t>(rows_each, 1, 16));
  launch(ctx, {.blocks = cut.items(strip), .threads = rank_threads}, write_ranks, cut, strip,
         digits, neighbours, Ranks{ranks[0], counts});
  for (int digit = 0; digit < digits.count; ++digit) {
    // The last pass writes to `rows`.
    const bool to_rows = (digits.count - digit) % 2 != 0;
    const SortPass pass = {.ranks = ranks[digit % 2],
                           .rows = digit == 0 ? nullptr
                                   : to_rows  ? spare
                                              : rows,
                           .sorted_ranks = ranks[(digit + 1) % 2],
                           .sorted_rows = to_rows ? rows : spare,
                           .counts = counts,
                           .words = sums + blocks * digits.bins() * digit,
                           .ticket = tickets + digit,
                           .digit = digit};
    launch(ctx, {.blocks = blocks, .threads = sort_threads}, sort_digits, cut, block, digits, pass);
  }
  result.ranks = ranks[digits.count % 2];
  result.done = tickets + most_digits;
  return result;
}

}  // namespace voxgemm::cuda

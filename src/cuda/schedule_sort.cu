// SPDX-License-Identifier: Apache-2.0
//
// Sorts the rows of every segment by the Gray ranks of their masks, stable: a radix sort with a
// launch for every digit of 9 bits, three for 27 taps in a group, one for three groups of 9.
//
//   write_ranks  a thread a row: Gray ranks, of the masks that the map came with, else of its
//                table, which takes 26 us of memory for 1.03 M rows. Each block of threads stays in
//                one segment and adds its counts of every digit's values to the segment's.
//   sort_digit   a block of threads sorts 1024, 2048 or 4096 positions by one digit (the toolkit's
//                ranks) and writes them out. The rows of a digit's value go behind those of lower
//                values of the segment (from the counts) and of earlier blocks of the segment, for
//                which every block has a word for each value (look_back).
//
// 27 bits of 1.03 M rows take 55 us on an H200, 17 a digit and 21 the first. The toolkit's sort
// takes 86, needs the segment's number in the key, and with it sometimes keys of 64 bits.
#include <algorithm>
#include <cub/block/block_radix_rank.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/schedule_cut.cuh"

namespace voxgemm::cuda {
namespace {

constexpr int digit_bits = 9;
constexpr uint32_t bins = 1 << digit_bits;
constexpr int sort_threads = bins;  // one a value of the digit
constexpr int most_digits = 4;      // of 32 bits

__host__ __device__ uint32_t digits_of(const Cut& cut) {
  return (cut.bits() + digit_bits - 1) / digit_bits;
}
__device__ uint32_t digit_of(uint32_t rank, uint32_t digit) {
  return rank >> (digit * digit_bits) & (bins - 1);
}

// Which of some taps a row has.
__device__ uint32_t find_mask(const Cut& cut, uint32_t first_tap, uint32_t taps, uint32_t row) {
  uint32_t mask = 0;
  if (cut.row_masks != nullptr) {
    mask = cut.row_masks[row] >> first_tap;
    return taps < 32 ? mask & ((1U << taps) - 1) : mask;
  }
  const int32_t* in = cut.neighbours + first_tap * cut.stride + row;
  // Loads on their way at once.
#pragma unroll
  for (uint32_t tap = 0; tap < 32; ++tap, in += cut.stride) {
    if ((tap < taps ? *in : -1) >= 0) mask |= 1U << tap;
  }
  return mask;
}

constexpr int rank_threads = 512;
constexpr uint32_t ranks_at_once = 4;  // of a thread

// A block: a strip of a segment. all_ranks: [positions]; counts: [segments][digits][bins], zeroed.
__global__ void __launch_bounds__(rank_threads, blocks_here(4))
    write_ranks(Cut cut, uint32_t strip_rows, uint32_t* all_ranks, uint32_t* counts) {
  __shared__ uint32_t histogram[most_digits * bins];
  // The last rows first: those that the table's writer left in the cache.
  const Part strip = cut.part_of(gridDim.x - 1 - blockIdx.x, cut.items(strip_rows));
  const uint32_t digits = digits_of(cut);
  const uint32_t size = digits * bins;
  for (uint32_t i = threadIdx.x; i < size; i += rank_threads) histogram[i] = 0;
  __syncthreads();
  const uint32_t first = strip.item * strip_rows;
  const uint32_t last = min(strip.rows, first + strip_rows);
  const uint32_t first_row = cut.first_row(strip.chunk);
  const uint32_t first_tap = cut.group_begin(strip.group);
  const uint32_t taps = cut.group_begin(strip.group + 1) - first_tap;
  uint32_t* ranks = all_ranks + strip.position;
  for (uint32_t begin = first + threadIdx.x; begin < last; begin += ranks_at_once * rank_threads) {
    uint32_t masks[ranks_at_once] = {};
    unroll<ranks_at_once>([&](int n) {
      const uint32_t i = begin + n * rank_threads;
      if (i < last) masks[n] = find_mask(cut, first_tap, taps, first_row + i);
    });
    unroll<ranks_at_once>([&](int n) {
      const uint32_t i = begin + n * rank_threads;
      if (i >= last) return;
      const uint32_t rank = gray_rank(masks[n]);
      ranks[i] = rank;
      if (cut.line > 1) ranks[i] |= cut.row_masks[first_row + i] & steady_bit;
      for (uint32_t digit = 0; digit < digits; ++digit) {
        atomicAdd(&histogram[digit * bins + digit_of(rank, digit)], 1U);
      }
    });
  }
  __syncthreads();
  counts += int64_t{strip.segment} * size;
  for (uint32_t i = threadIdx.x; i < size; i += rank_threads) {
    if (histogram[i] != 0) atomicAdd(&counts[i], histogram[i]);
  }
}

struct SortPass {
  const uint32_t* ranks;  // [positions]
  const uint32_t* rows;   // [positions], or null: ascending in every segment
  uint32_t* sorted_ranks;
  uint32_t* sorted_rows;
  const uint32_t* counts;  // of write_ranks
  uint32_t* words;         // [blocks][bins], zero before
  uint32_t* ticket;        // zero before
  uint32_t digit;
};

// Positions behind the last row of a segment have the highest value and come last, unused.
template <int rounds>
__global__ void __launch_bounds__(sort_threads, blocks_here(2)) sort_digit(Cut cut, SortPass pass) {
  using Rank = cub::BlockRadixRankMatchEarlyCounts<sort_threads, digit_bits, false>;
  using Scan = cub::BlockScan<uint32_t, sort_threads, cub::BLOCK_SCAN_WARP_SCANS>;
  constexpr uint32_t block_rows = sort_threads * rounds;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Rank::TempStorage rank;
    uint2 exchanged[block_rows];  // rank, row
  } shared;
  __shared__ uint32_t targets[bins];  // what leads from a place in the block to the position
  __shared__ uint32_t number;
  if (threadIdx.x == 0) number = atomicAdd(pass.ticket, 1U);
  __syncthreads();
  const Part part = cut.part_of(number, cut.items(block_rows));
  const uint32_t begin = part.item * block_rows;
  if (begin >= part.rows) return;
  const uint32_t first = part.position + begin;
  const uint32_t count = min(block_rows, part.rows - begin);
  uint32_t ranks[rounds];
  uint32_t rows[rounds];
  unroll<rounds>([&](int i) {
    const uint32_t offset = threadIdx.x / 32 * (32 * rounds) + i * 32 + threadIdx.x % 32;
    const bool used = offset < count;
    ranks[i] = used ? pass.ranks[first + offset] : 0xffffffff;
    rows[i] = cut.first_row(part.chunk) + begin + offset;
    if (pass.rows != nullptr && used) rows[i] = pass.rows[first + offset];
  });

  const uint32_t value = threadIdx.x;
  uint32_t before = 0;  // of the segment's rows, those of lower values and of earlier blocks
  if (part.item == 0) {
    before = pass.counts[(int64_t{part.segment} * digits_of(cut) + pass.digit) * bins + value];
    Scan(shared.scan).ExclusiveSum(before, before);
    __syncthreads();
  }
  volatile uint32_t* word = pass.words + int64_t{number} * bins + value;
  uint32_t in_block = 0;
  const auto publish = [&](int(&counts)[1]) {
    in_block = counts[0];
    *word = part.item == 0 ? is_sum | (before + in_block) : 1 + in_block;
  };
  int places[rounds];
  int start[1];
  const cub::BFEDigitExtractor<uint32_t> digit(pass.digit * digit_bits, digit_bits);
  Rank(shared.rank).RankKeys(ranks, places, digit, start, publish);
  if (part.item > 0) {
    before = look_back(word, bins, part.item);
    *word = is_sum | (before + in_block);
  }
  targets[value] = first + before - begin - start[0];
  __syncthreads();
  unroll<rounds>([&](int i) { shared.exchanged[places[i]] = make_uint2(ranks[i], rows[i]); });
  __syncthreads();
  unroll<rounds>([&](int i) {
    const uint32_t place = i * sort_threads + threadIdx.x;
    if (place >= count) return;
    const uint2 item = shared.exchanged[place];
    const uint32_t position = targets[digit_of(item.x, pass.digit)] + place;
    pass.sorted_ranks[position] = item.x;
    pass.sorted_rows[position] = item.y;
  });
}

}  // namespace

SortedRows sort_rows(const Context& ctx,
                     const Cut& cut,
                     uint32_t* rows,
                     const Room<uint32_t>& zeroed,
                     const Room<uint32_t>& others) {
  const int64_t positions = int64_t{cut.rows} * cut.groups;
  const int64_t segments = cut.segments();
  const uint32_t digits = digits_of(cut);
  // Rows a thread: as few as leave no multiprocessor two blocks.
  int rounds = 8;
  while (rounds > 2 && segments * cut.items(sort_threads * rounds / 2) <= multiprocessors(ctx)) {
    rounds /= 2;
  }
  const auto sort_digits = rounds == 8   ? sort_digit<8>
                           : rounds == 4 ? sort_digit<4>
                                         : sort_digit<2>;
  const int64_t blocks = segments * cut.items(sort_threads * rounds);
  SortedRows result;
  uint32_t* tickets = nullptr;
  uint32_t* counts = nullptr;
  uint32_t* words = nullptr;
  uint32_t* ranks[2] = {};
  uint32_t* spare = nullptr;
  result.memory =
      make_room(ctx, Room{&tickets, most_digits}, Room{&counts, segments * digits * bins},
                Room{&words, blocks * digits * bins}, zeroed, Room{&ranks[0], positions},
                Room{&ranks[1], positions}, Room{&spare, digits > 1 ? positions : 0}, others);
  fill_bytes(ctx, tickets, 0, sizeof(uint32_t) * (ranks[0] - tickets));
  // Rows of a block of threads: two blocks a multiprocessor, as each clears and adds up its counts.
  const int64_t rows_each = ceil_div(cut.rows, int64_t{rank_threads} * 2 * multiprocessors(ctx));
  const auto strip_rows =
      static_cast<uint32_t>(rank_threads * std::clamp<int64_t>(rows_each, 1, 16));
  launch(ctx, {.blocks = segments * cut.items(strip_rows), .threads = rank_threads}, write_ranks,
         cut, strip_rows, ranks[0], counts);
  const uint32_t* sorted = nullptr;
  for (uint32_t digit = 0; digit < digits; ++digit) {
    // The last pass writes to `rows`.
    uint32_t* const to = (digits - digit) % 2 != 0 ? rows : spare;
    const SortPass pass = {.ranks = ranks[digit % 2],
                           .rows = sorted,
                           .sorted_ranks = ranks[(digit + 1) % 2],
                           .sorted_rows = to,
                           .counts = counts,
                           .words = words + blocks * bins * digit,
                           .ticket = tickets + digit,
                           .digit = digit};
    launch(ctx, {.blocks = blocks, .threads = sort_threads}, sort_digits, cut, pass);
    sorted = to;
  }
  result.ranks = ranks[digits % 2];
  return result;
}

}  // namespace voxgemm::cuda

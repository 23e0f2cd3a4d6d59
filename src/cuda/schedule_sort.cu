// SPDX-License-Identifier: Apache-2.0
//
// Sorts the rows of every segment by the Gray ranks of their masks, stable: a radix sort with
// digits of at most 9 bits, one launch a digit. 27 taps in one group are three launches, 9 taps of
// three groups one.
//
//   write_ranks  a thread a row: Gray ranks. Reads the table once, 4 bytes an entry. Each block of
//                threads stays in one segment and adds its counts of every digit's values to the
//                segment's.
//   sort_digit   a block of threads sorts 4096 positions by one digit and writes them out. The
//                rows of a digit's value go behind those of lower values of the segment (from the
//                counts) and of earlier blocks of the segment. For the latter every block
//                publishes its counts, a word for each value, and then the sums with all blocks
//                before it:
//                  0                   nothing yet
//                  1 + count           of this block alone
//                  top bit | sum       of this block and all before
//                and looks back from its own word, 8 words at a time, until it meets a sum. Blocks
//                are numbered by a ticket, so those before are running or done: it always ends.
//
// In a block: warps own 256 consecutive positions, 8 rounds of 32. In a round lanes with the same
// digit find each other, and the warp counts on in its own row of shared memory; sums over the
// warps and over the values give the place in the block, by which positions are exchanged, so that
// the writes of neighbouring lanes are neighbours.
//
// A segment of one block needs no counts. The toolkit's sort, which this replaced, takes four
// launches of 8 bits for 27 taps, and two more around them; see sorting.h.
#include <algorithm>

#include "cuda/schedule_cut.cuh"

namespace voxgemm::cuda {
namespace {

constexpr unsigned all_lanes = 0xffffffff;
constexpr int most_digit_bits = 9;
constexpr uint32_t most_bins = 1 << most_digit_bits;
constexpr int sort_threads = most_bins;  // one a value of the digit
constexpr int sort_warps = sort_threads / 32;
constexpr int rounds = 8;
constexpr uint32_t block_rows = sort_threads * rounds;
constexpr int most_digits = 4;  // of 32 bits

struct Digits {
  int count;
  int bits;  // of each

  explicit Digits(int key_bits)
      : count(static_cast<int>(ceil_div(key_bits, most_digit_bits))),
        bits(static_cast<int>(ceil_div(key_bits, count))) {}
  __host__ __device__ uint32_t bins() const { return 1U << bits; }
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
  uint32_t mask = 0;
#pragma unroll 9
  for (uint32_t tap = 0; tap < taps; ++tap) {
    mask |= static_cast<uint32_t>(neighbours(first_tap + tap, row) >= 0) << tap;
  }
  return mask;
}

constexpr int rank_threads = 256;

// counts: [segments][digits][bins], zero before, or null. Blocks of threads: strips of all chunks,
// and groups.
__global__ void __launch_bounds__(rank_threads) write_ranks(
    Cut cut, Grain strip, Digits digits, Neighbours neighbours, uint32_t* ranks, uint32_t* counts) {
  __shared__ uint32_t histogram[most_digits * most_bins];
  const uint32_t chunk = blockIdx.x / strip.whole;
  const Part part = cut.segment(chunk, blockIdx.y, strip);
  const uint32_t size = digits.count * digits.bins();
  for (uint32_t i = threadIdx.x; i < size; i += rank_threads) histogram[i] = 0;
  __syncthreads();
  const uint32_t first = (blockIdx.x - chunk * strip.whole) * strip.rows;
  const uint32_t last = min(part.rows, first + strip.rows);
  const uint32_t first_tap = cut.group_begin(part.group);
  const uint32_t taps = cut.group_begin(part.group + 1) - first_tap;
  ranks += cut.first_position(part);
  for (uint32_t i = first + threadIdx.x; i < last; i += rank_threads) {
    const uint32_t rank = gray_rank(find_mask(neighbours, first_tap, taps, part.first_row + i));
    ranks[i] = rank;
    for (int digit = 0; counts != nullptr && digit < digits.count; ++digit) {
      const uint32_t value = rank >> (digit * digits.bits) & (digits.bins() - 1);
      atomicAdd(&histogram[digit * digits.bins() + value], 1U);
    }
  }
  if (counts == nullptr) return;
  __syncthreads();
  counts += (static_cast<int64_t>(chunk) * cut.groups + part.group) * size;
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

// Sums over the threads before this one, of two numbers.
__device__ uint2 sums_before(uint2 value) {
  __shared__ uint2 warp_sums[sort_warps];
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  uint2 through = value;
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t x = __shfl_up_sync(all_lanes, through.x, lanes);
    const uint32_t y = __shfl_up_sync(all_lanes, through.y, lanes);
    if (lane >= lanes) through = make_uint2(through.x + x, through.y + y);
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  uint2 sum = make_uint2(through.x - value.x, through.y - value.y);
  for (uint32_t w = 0; w < warp; ++w) {
    sum = make_uint2(sum.x + warp_sums[w].x, sum.y + warp_sums[w].y);
  }
  return sum;
}

constexpr uint32_t is_sum = 1U << 31;

// The sum of what the blocks before this one published, `step` words apart, `blocks` of them.
__device__ uint32_t look_back(const volatile uint32_t* own, uint32_t step, uint32_t blocks) {
  constexpr uint32_t window = 8;
  uint32_t sum = 0;
  uint32_t looked = 0;  // blocks whose counts are in the sum
  while (looked < blocks) {
    uint32_t words[window];
#pragma unroll
    for (uint32_t i = 0; i < window; ++i) {
      words[i] = looked + i < blocks ? own[-static_cast<int64_t>(looked + i + 1) * step] : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < window; ++i) {
      if (words[i] == 0) break;
      if ((words[i] & is_sum) != 0) return sum + (words[i] & ~is_sum);
      sum += words[i] - 1;
      ++looked;
    }
  }
  return sum;
}

__global__ void __launch_bounds__(sort_threads)
    sort_digit(Cut cut, Grain grain, Digits digits, SortPass pass) {
  __shared__ union {
    uint32_t warp_counts[sort_warps][most_bins];
    struct {
      uint32_t ranks[block_rows];
      uint32_t rows[block_rows];
    } exchanged;
  } shared;
  __shared__ uint32_t starts[most_bins];   // of a value in the block
  __shared__ uint32_t targets[most_bins];  // what leads from there to the position
  __shared__ uint32_t number;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lanes_below = (1U << lane) - 1;
  if (threadIdx.x == 0) number = atomicAdd(pass.ticket, 1U);
  for (uint32_t i = lane; i < most_bins; i += 32) shared.warp_counts[warp][i] = 0;
  __syncthreads();
  const Part part = cut.part(number, grain);
  const uint32_t begin = part.item * block_rows;
  const uint32_t count = min(block_rows, part.rows - begin);
  const uint32_t first = cut.first_position(part) + begin;
  const int shift = pass.digit * digits.bits;
  const uint32_t bins = digits.bins();

  // Places behind the last row have the highest value and come last: nothing depends on them.
  uint32_t ranks[rounds];
  uint32_t rows[rounds];
  uint32_t places[rounds];
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const uint32_t offset = warp * (32 * rounds) + i * 32 + lane;
    ranks[i] = offset < count ? pass.ranks[first + offset] : 0xffffffff;
    rows[i] = part.first_row + begin + offset;
    if (pass.rows != nullptr && offset < count) rows[i] = pass.rows[first + offset];
  }
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    uint32_t* counted = &shared.warp_counts[warp][ranks[i] >> shift & (bins - 1)];
    const unsigned peers = __match_any_sync(all_lanes, ranks[i] >> shift & (bins - 1));
    const uint32_t before = *counted;
    __syncwarp();
    places[i] = before + __popc(peers & lanes_below);
    if ((peers & lanes_below) == 0) *counted = before + __popc(peers);
    __syncwarp();
  }
  __syncthreads();

  const uint32_t value = threadIdx.x;
  uint32_t in_block = 0;
  for (int w = 0; w < sort_warps; ++w) {
    const uint32_t of_warp = shared.warp_counts[w][value];
    shared.warp_counts[w][value] = in_block;
    in_block += of_warp;
  }
  volatile uint32_t* word = pass.words + static_cast<int64_t>(number) * bins + value;
  const bool publishes = part.items > 1 && value < bins;
  if (publishes) *word = part.item == 0 ? is_sum | in_block : 1 + in_block;
  const int64_t segment =
      static_cast<int64_t>(part.first_row / cut.chunk_rows) * cut.groups + part.group;
  uint32_t in_segment = 0;
  if (publishes) in_segment = pass.counts[(segment * digits.count + pass.digit) * bins + value];
  const uint2 before = sums_before(make_uint2(in_block, in_segment));
  starts[value] = before.x;
  targets[value] = cut.first_position(part) + before.y - before.x;
  if (part.items == 1) targets[value] = cut.first_position(part);
  if (publishes && part.item > 0) {
    const uint32_t earlier = look_back(word, bins, part.item);
    *word = is_sum | (earlier + in_block);
    targets[value] += earlier;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const uint32_t at = ranks[i] >> shift & (bins - 1);
    places[i] += starts[at] + shared.warp_counts[warp][at];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    shared.exchanged.ranks[places[i]] = ranks[i];
    shared.exchanged.rows[places[i]] = rows[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const uint32_t place = i * sort_threads + threadIdx.x;
    if (place >= count) break;
    const uint32_t rank = shared.exchanged.ranks[place];
    const uint32_t position = targets[rank >> shift & (bins - 1)] + place;
    pass.sorted_ranks[position] = rank;
    pass.sorted_rows[position] = shared.exchanged.rows[place];
  }
}

}  // namespace

SortedRows sort_rows(const Context& ctx,
                     const Cut& cut,
                     const Neighbours& neighbours,
                     uint32_t* rows) {
  const int64_t positions = int64_t{cut.rows} * cut.groups;
  const Digits digits(cut.bits());
  const Grain block = cut.grain(block_rows);
  const int64_t blocks = cut.items(block);
  const bool counted = block.whole > 1;
  const int64_t count_size = counted ? cut.segments() * digits.count * digits.bins() : 0;
  const int64_t words = counted ? blocks * digits.bins() : 0;
  Layout layout;
  const size_t tickets_at = layout.add<uint32_t>(most_digits);
  const size_t counts_at = layout.add<uint32_t>(count_size);
  const size_t words_at = layout.add<uint32_t>(words * digits.count);
  const size_t zeroed = layout.bytes();
  const size_t ranks_at[2] = {layout.add<uint32_t>(positions), layout.add<uint32_t>(positions)};
  const size_t rows_at = layout.add<uint32_t>(digits.count > 1 ? positions : 0);
  SortedRows result;
  result.memory = ctx.allocate(layout.bytes());
  fill_bytes(ctx, result.memory.get(), 0, zeroed);
  uint32_t* ranks[2] = {Layout::at<uint32_t>(result.memory, ranks_at[0]),
                        Layout::at<uint32_t>(result.memory, ranks_at[1])};
  uint32_t* spare = Layout::at<uint32_t>(result.memory, rows_at);
  uint32_t* counts = counted ? Layout::at<uint32_t>(result.memory, counts_at) : nullptr;
  // Rows of a block of threads: enough blocks to fill the device, and no more counting than that.
  const int64_t rows_each = ceil_div(cut.rows, int64_t{rank_threads} * 8 * multiprocessors(ctx));
  const Grain strip = cut.grain(rank_threads * std::clamp<int64_t>(rows_each, 1, 8));
  const Grid strips = {
      .blocks = cut.chunks() * strip.whole, .columns = cut.groups, .threads = rank_threads};
  launch(ctx, strips, write_ranks, cut, strip, digits, neighbours, ranks[0], counts);
  for (int digit = 0; digit < digits.count; ++digit) {
    // The last pass writes to `rows`.
    const bool to_rows = (digits.count - digit) % 2 != 0;
    const SortPass pass = {
        .ranks = ranks[digit % 2],
        .rows = digit == 0 ? nullptr : to_rows ? spare : rows,
        .sorted_ranks = ranks[(digit + 1) % 2],
        .sorted_rows = to_rows ? rows : spare,
        .counts = counts,
        .words = Layout::at<uint32_t>(result.memory, words_at) + words * digit,
        .ticket = Layout::at<uint32_t>(result.memory, tickets_at) + digit,
        .digit = digit};
    launch(ctx, {.blocks = blocks, .threads = sort_threads}, sort_digit, cut, block, digits, pass);
  }
  result.ranks = ranks[digits.count % 2];
  return result;
}

}  // namespace voxgemm::cuda

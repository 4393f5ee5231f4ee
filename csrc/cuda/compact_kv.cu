// compact_kv on CUDA. A plan says for every record that moves from where it comes; then, tier after
// tier from the lowest up, survivors close the holes and demoted records are encoded behind them: a
// demotion reads a tier that is still as it was.
#include <algorithm>

#include "cuda_ops.h"
#include "record_io.h"

namespace smartkv {
namespace {

constexpr int PLAN_THREADS = 256;
constexpr int PLAN_WARPS = PLAN_THREADS / WARP;
constexpr int TARGETS_OF_THREAD = 16;  // one load
constexpr int WARPS_PER_BLOCK = 4;
constexpr int MAX_PLANES = 2;
constexpr int LANES_PER_VALUE = 8;  // of V: four tokens by eight channels are a sector
constexpr int MAX_BLOCKS_PER_HEAD = 256;

// What becomes of the records of each head and tier `t`, its list = head * num_tiers + t.
struct Plan {
  int32_t* holes;      // [lists, capacity]: slots below the new end that are free, ascending
  int32_t* survivors;  // [lists, capacity]: records above it that stay, ascending, as many
  int32_t* demoted;    // [lists, capacity]: of tier s at its start: those for tier t, then ...
  int32_t* num_holes;  // [lists]
  int32_t* kept;       // [lists], records that stay in the tier
  int32_t* first;      // [lists, MAX_TIERS + 1]: where in `demoted` of this list those for t begin
  int64_t capacity;
};

// Kernels

// Exclusive sum of `count` over the threads of the block in order, plus `total` so far, which is
// advanced.
__device__ __forceinline__ int rank_in_block(int count, int32_t (&sums)[PLAN_WARPS], int& total) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int sum = count;
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const int other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();  // the sums before these have been read
  if (lane == WARP - 1) sums[warp] = sum;
  __syncthreads();
  int rank = total + sum - count;
  for (int w = 0; w < PLAN_WARPS; ++w) {
    if (w < warp) rank += sums[w];
    total += sums[w];
  }
  return rank;
}

// Sixteen targets of a list, from a multiple of sixteen on.
struct Targets {
  uint4 words;
  int first, length;  // of the list

  __device__ __forceinline__ Targets(const int8_t* targets, int first, int length)
      : words{}, first(first), length(length) {
    if (!is_within(first, length)) return;
    if (reinterpret_cast<uintptr_t>(targets) % sizeof words == 0) {
      words = *reinterpret_cast<const uint4*>(targets + first);
    } else {
      memcpy(&words, targets + first, sizeof words);
    }
  }

  // Bit k: the k-th is a record for `tier`.
  __device__ __forceinline__ unsigned for_tier(int tier) const {
    unsigned found = 0;
#pragma unroll
    for (int k = 0; k < TARGETS_OF_THREAD; ++k) {
      const unsigned word = k < 4 ? words.x : k < 8 ? words.y : k < 12 ? words.z : words.w;
      const bool is_for = static_cast<int8_t>(word >> k % 4 * 8) == tier;
      found |= static_cast<unsigned>(is_for && is_within(first + k, length)) << k;
    }
    return found;
  }
};

// first + k for every bit k of `found`, in order.
__device__ __forceinline__ void list_bits(int32_t* to, int first, unsigned found) {
#pragma unroll
  for (int k = 0; k < TARGETS_OF_THREAD; ++k) {
    if (found >> k & 1) *to++ = first + k;
  }
}

// A block per list. grid_shape: [batch * num_kv_heads * num_tiers].
__global__ void __launch_bounds__(PLAN_THREADS) plan_compact_kernel(CompactParams p, Plan plan) {
  SMARTKV_SHARED(sums, int32_t[PLAN_WARPS]);
  constexpr int STEP = PLAN_THREADS * TARGETS_OF_THREAD;
  const int64_t list = blockIdx.x;
  const int tier = static_cast<int>(list % p.cache.num_tiers);
  const int length = list_length(p.cache, list / p.cache.num_tiers, tier);
  const int8_t* const targets = p.targets + list * plan.capacity;
  const int mine = static_cast<int>(threadIdx.x) * TARGETS_OF_THREAD;
  int kept = 0;
  for (int first = mine; first - mine < length; first += STEP) {
    rank_in_block(__popc(Targets(targets, first, length).for_tier(tier)), sums, kept);
  }
  int holes = 0, survivors = 0;
  for (int first = mine; first - mine < length; first += STEP) {
    const unsigned stay = Targets(targets, first, length).for_tier(tier);
    const unsigned below = (1u << clamp_to(0, kept - first, TARGETS_OF_THREAD)) - 1;
    // As many survivors lie behind the end as there are holes before it.
    const int hole = rank_in_block(__popc(~stay & below), sums, holes);
    list_bits(plan.holes + list * plan.capacity + hole, first, ~stay & below);
    const int survivor = rank_in_block(__popc(stay & ~below), sums, survivors);
    list_bits(plan.survivors + list * plan.capacity + survivor, first, stay & ~below);
  }
  int demoted = 0;
  for (int t = 0; t < tier; ++t) {
    if (threadIdx.x == 0) plan.first[list * (MAX_TIERS + 1) + t] = demoted;
    for (int first = mine; first - mine < length; first += STEP) {
      const unsigned fall = Targets(targets, first, length).for_tier(t);
      const int rank = rank_in_block(__popc(fall), sums, demoted);
      list_bits(plan.demoted + list * plan.capacity + rank, first, fall);
    }
  }
  if (threadIdx.x != 0) return;
  plan.first[list * (MAX_TIERS + 1) + tier] = demoted;
  plan.num_holes[list] = holes;
  plan.kept[list] = kept;
}

// A record's way to another slot of its tier.
struct Move {
  uint8_t* to;
  const uint8_t* from;
  int to_slot, from_slot;

  __device__ __forceinline__ Move of_lane(int lane) const {
    return {
        reinterpret_cast<uint8_t*>(__shfl_sync(ALL_LANES, reinterpret_cast<uintptr_t>(to), lane)),
        reinterpret_cast<const uint8_t*>(
            __shfl_sync(ALL_LANES, reinterpret_cast<uintptr_t>(from), lane)),
        __shfl_sync(ALL_LANES, to_slot, lane), __shfl_sync(ALL_LANES, from_slot, lane)};
  }
};

// The values of `count` records of 16 bits, one after the other in pieces of 16 bytes.
__device__ __forceinline__ void move_values(const PageLayout& layout, const Move& mine, int count) {
  const int pieces = layout.head_dim * layout.itemsize / static_cast<int>(sizeof(uint4));
  for (int i = 0; i < count; ++i) {
    const Move move = mine.of_lane(i);
    for (int j = threadIdx.x % WARP; j < 2 * pieces; j += WARP) {
      const int64_t start = j < pieces ? layout.k_codes : layout.v_codes;
      const int piece = j < pieces ? j : j - pieces;
      reinterpret_cast<uint4*>(move.to + start)[move.to_slot * pieces + piece] =
          reinterpret_cast<const uint4*>(move.from + start)[move.from_slot * pieces + piece];
    }
  }
}

// The codes of up to 32 records, a lane each. Records that follow each other share the 32-byte
// sectors of K, where a lane moves its own, word by word, and of V, where eight lanes do.
__device__ __forceinline__ void move_codes(const PageLayout& layout, const Move& mine, int count) {
  const int lane = threadIdx.x % WARP;
  Planes planes = code_planes(layout.k_bits);
  int64_t start = layout.k_codes;
#pragma unroll
  for (int i = 0; i < MAX_PLANES; ++i) {
    if (i >= planes.count) break;
    const int lanes = plane_lanes(layout.head_dim, planes.width[i]);
    if (is_within(lane, count)) {
#pragma unroll 8
      for (int j = 0; j < lanes; j += 4) {
        *reinterpret_cast<unsigned*>(mine.to + start + k_lane_offset(lanes, mine.to_slot, j)) =
            *reinterpret_cast<const unsigned*>(mine.from + start +
                                               k_lane_offset(lanes, mine.from_slot, j));
      }
    }
    start += PAGE_SIZE * lanes;
  }
  planes = code_planes(layout.v_bits);
  for (int first = 0; first < count; first += WARP / LANES_PER_VALUE) {
    const int record = first + lane / LANES_PER_VALUE;
    const Move move = mine.of_lane(record);
    start = layout.v_codes;
#pragma unroll
    for (int i = 0; i < MAX_PLANES; ++i) {
      if (i >= planes.count) break;
      const int lanes = plane_lanes(layout.head_dim, planes.width[i]);
      if (is_within(record, count)) {
#pragma unroll 8
        for (int j = lane % LANES_PER_VALUE; j < lanes; j += LANES_PER_VALUE) {
          move.to[start + v_lane_offset(lanes, move.to_slot, j)] =
              move.from[start + v_lane_offset(lanes, move.from_slot, j)];
        }
      }
      start += PAGE_SIZE * lanes;
    }
  }
}

// Fills the holes of one tier, a warp per 32 of them. grid_shape: [blocks, batch * num_kv_heads].
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK, 6)
    close_holes_kernel(CompactParams p, Plan plan, int tier) {
  const PagedKV& cache = p.cache;
  const int64_t head = blockIdx.y, list = head * cache.num_tiers + tier;
  const PageLayout layout =
      page_layout(cache.tier_bits[tier], cache.head_dim, dtype_size(cache.raw_dtype));
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, holes = plan.num_holes[list];
  const int step = static_cast<int>(gridDim.x) * WARPS_PER_BLOCK * WARP;
  for (int first = (blockIdx.x * WARPS_PER_BLOCK + warp) * WARP; first < holes; first += step) {
    const int count = min(WARP, holes - first);
    Move mine{};
    if (is_within(lane, count)) {
      // The last fills the first: the order that the CPU kernels have.
      const int to = plan.holes[list * plan.capacity + first + lane];
      const int from = plan.survivors[list * plan.capacity + holes - 1 - first - lane];
      mine = {page_of(cache, head, tier, to), page_of(cache, head, tier, from), to % PAGE_SIZE,
              from % PAGE_SIZE};
      const auto move_label = [&]<typename T>(int64_t section, T) {
        reinterpret_cast<T*>(mine.to + section)[mine.to_slot] =
            reinterpret_cast<const T*>(mine.from + section)[mine.from_slot];
      };
      if (!layout.is_raw()) {
        move_label(layout.k_scale, uint16_t{});
        move_label(layout.v_scale, uint16_t{});
      }
      move_label(layout.position, int32_t{});
      move_label(layout.score, uint16_t{});
    }
    layout.is_raw() ? move_values(layout, mine, count) : move_codes(layout, mine, count);
  }
}

// Copies the codes and the scale of this half's row.
template <int BITS>
__device__ __forceinline__ void copy_half(const PageLayout& to_layout, uint8_t* to, int to_slot,
                                          const PageLayout& from_layout, const uint8_t* from,
                                          int from_slot) {
  constexpr Planes PLANES = code_planes(BITS);
  const bool is_v = is_value_half();
  const int lane = threadIdx.x % HALF_WARP;
  uint8_t* into = to + (is_v ? to_layout.v_codes : to_layout.k_codes);
  const uint8_t* out_of = from + (is_v ? from_layout.v_codes : from_layout.k_codes);
#pragma unroll
  for (int i = 0; i < PLANES.count; ++i) {
    const int lanes = plane_lanes(to_layout.head_dim, PLANES.width[i]);
    const auto offset = [&](int slot, int j) {
      return is_v ? v_lane_offset(lanes, slot, j) : k_lane_offset(lanes, slot, j);
    };
    for (int j = lane; j < lanes; j += HALF_WARP) {
      into[offset(to_slot, j)] = out_of[offset(from_slot, j)];
    }
    into += PAGE_SIZE * lanes;
    out_of += PAGE_SIZE * lanes;
  }
  if (lane != 0) return;
  const int64_t to_scale = is_v ? to_layout.v_scale : to_layout.k_scale;
  const int64_t from_scale = is_v ? from_layout.v_scale : from_layout.k_scale;
  reinterpret_cast<uint16_t*>(to + to_scale)[to_slot] =
      reinterpret_cast<const uint16_t*>(from + from_scale)[from_slot];
}

// Re-encodes a record for a page of tier TO; quantised ones stay rotated, and what keeps its bits
// stays as it is.
template <int HEAD_DIM, int TO>
__device__ __forceinline__ void demote_record(const PagedKV& cache, int64_t head, int from_tier,
                                              const uint8_t* from, int from_slot,
                                              const TierBooks& from_books, uint8_t* to, int to_slot,
                                              const TierBooks& to_books, CodeScratch& scratch) {
  if (from_tier == 16) {
    const int64_t row = int64_t{HEAD_DIM} * dtype_size(cache.raw_dtype);
    const PageLayout layout = page_layout(16, HEAD_DIM, dtype_size(cache.raw_dtype));
    const int position = reinterpret_cast<const int32_t*>(from + layout.position)[from_slot];
    const uint8_t* const values = from + (is_value_half() ? PAGE_SIZE * row : 0) + from_slot * row;
    write_row<HEAD_DIM, TO>(
        to, to_slot, to_books, cache.levels, reinterpret_cast<const char*>(values), cache.raw_dtype,
        shift_of_head(cache.k_mean, cache.turns, head, HEAD_DIM), position, scratch);
    return;
  }
  HeadRow<HEAD_DIM> row{};
  SMARTKV_TIER_SWITCH(from_tier, [&] {
    if constexpr (TIER != 16 && bits_of_pair(TIER) > bits_of_pair(TO)) {
      row = read_codes<HEAD_DIM, TIER>(from, from_slot, from_books);
    }
  });
  write_codes<HEAD_DIM, TO>(to, to_slot, to_books, cache.levels, row, scratch);
  const PageLayout from_layout = page_layout(from_tier, HEAD_DIM);
  constexpr PageLayout TO_LAYOUT = page_layout(TO, HEAD_DIM);
  const bool keeps_k = from_layout.k_bits == TO_LAYOUT.k_bits;
  const bool keeps_v = from_layout.v_bits == TO_LAYOUT.v_bits;
  if (!keeps_k && !keeps_v) return;
  __syncwarp();  // the new codes have been written, and are now replaced
  if (keeps_k && !is_value_half()) {
    copy_half<TO_LAYOUT.k_bits>(TO_LAYOUT, to, to_slot, from_layout, from, from_slot);
  }
  if (keeps_v && is_value_half()) {
    copy_half<TO_LAYOUT.v_bits>(TO_LAYOUT, to, to_slot, from_layout, from, from_slot);
  }
}

// Encodes what falls to a tier of kind TO, those of the highest tier first, behind its survivors;
// then the list has its new length. A warp per record. grid_shape: [blocks, batch * num_kv_heads].
template <int HEAD_DIM, int TO>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK, 2)
    demote_kernel(CompactParams p, Codebooks codebooks, Plan plan, int tier) {
  SMARTKV_SHARED(scratch, CodeScratch[WARPS_PER_BLOCK]);
  SMARTKV_SHARED(books, Codebooks);
  const PagedKV& cache = p.cache;
  const int64_t head = blockIdx.y, first_list = head * cache.num_tiers;
  if (threadIdx.x == 0) books = codebooks;
  __syncthreads();
  const int warp = threadIdx.x / WARP;
  const PageLayout layout = page_layout(TO, HEAD_DIM, dtype_size(cache.raw_dtype));
  int end = plan.kept[first_list + tier];
  for (int source = cache.num_tiers - 1; source > tier; --source) {
    const int64_t list = first_list + source;
    const int32_t* const first = plan.first + list * (MAX_TIERS + 1) + tier;
    const int32_t* const records = plan.demoted + list * plan.capacity + first[0];
    const int room = cache.num_pages[tier] > 0 ? static_cast<int>(plan.capacity) - end : 0;
    const int count = clamp_to(0, first[1] - first[0], room);
    const PageLayout source_layout =
        page_layout(cache.tier_bits[source], HEAD_DIM, dtype_size(cache.raw_dtype));
    for (int i = blockIdx.x * WARPS_PER_BLOCK + warp; i < count; i += gridDim.x * WARPS_PER_BLOCK) {
      const int from_slot = records[i] % PAGE_SIZE, to_slot = (end + i) % PAGE_SIZE;
      const uint8_t* const from = page_of(cache, head, source, records[i]);
      uint8_t* const to = page_of(cache, head, tier, end + i);
      if constexpr (TO != 16) {  // the highest: nothing falls to it
        demote_record<HEAD_DIM, TO>(cache, head, cache.tier_bits[source], from, from_slot,
                                    books.of_tier[source], to, to_slot, books.of_tier[tier],
                                    scratch[warp]);
      }
      if (threadIdx.x % WARP == 0) {
        write_label(to, layout, to_slot,
                    reinterpret_cast<const int32_t*>(from + source_layout.position)[from_slot],
                    reinterpret_cast<const uint16_t*>(from + source_layout.score)[from_slot]);
      }
    }
    end += count;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) cache.cache_seqlens[first_list + tier] = end;
}

// Kernel launchers

int64_t num_lists(const PagedKV& cache) {
  return int64_t{cache.batch} * cache.num_kv_heads * cache.num_tiers;
}

Plan make_plan(const CompactParams& p, void* workspace) {
  const int64_t lists = num_lists(p.cache), capacity = p.cache.max_pages * PAGE_SIZE;
  int32_t* next = static_cast<int32_t*>(workspace);
  const auto take = [&](int64_t count) { return (next += count) - count; };
  Plan plan{};
  plan.holes = take(lists * capacity);
  plan.survivors = take(lists * capacity);
  plan.demoted = take(lists * capacity);
  plan.num_holes = take(lists);
  plan.kept = take(lists);
  plan.first = take(lists * (MAX_TIERS + 1));
  plan.capacity = capacity;
  return plan;
}

}  // namespace

size_t compact_kv_workspace(const CompactParams& p) {
  const int64_t capacity = p.cache.max_pages * PAGE_SIZE;
  return num_lists(p.cache) * (3 * capacity + 2 + MAX_TIERS + 1) * sizeof(int32_t);
}

const char* compact_kv_cuda(const CompactParams& p, void* workspace, void* stream) {
  const PagedKV& cache = p.cache;
  const int64_t lists = num_lists(cache), capacity = cache.max_pages * PAGE_SIZE;
  if (lists == 0 || capacity == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Plan plan = make_plan(p, workspace);
  const Codebooks books = make_codebooks(cache.tier_bits, cache.num_tiers, cache.levels);
  SMARTKV_LAUNCH(plan_compact_kernel, static_cast<unsigned>(lists), PLAN_THREADS, 0, cuda_stream, p,
                 plan);
  const int64_t blocks = std::min<int64_t>(capacity / WARPS_PER_BLOCK, MAX_BLOCKS_PER_HEAD);
  const auto heads = static_cast<unsigned>(cache.batch * cache.num_kv_heads);
  const dim3 grid(static_cast<unsigned>(blocks), heads);
  // At most half of the slots are holes with a survivor behind them.
  const int64_t most_holes = capacity / 2, holes_of_block = WARPS_PER_BLOCK * WARP;
  const dim3 hole_grid(static_cast<unsigned>((most_holes + holes_of_block - 1) / holes_of_block),
                       heads);
  for (int tier = 0; tier < cache.num_tiers; ++tier) {
    if (cache.num_pages[tier] == 0) continue;  // no records, and no room for any
    SMARTKV_LAUNCH(close_holes_kernel, hole_grid, WARP * WARPS_PER_BLOCK, 0, cuda_stream, p, plan,
                   tier);
    SMARTKV_HEAD_DIM_SWITCH(cache.head_dim, [&] {
      SMARTKV_TIER_SWITCH(cache.tier_bits[tier], [&] {
        SMARTKV_LAUNCH((demote_kernel<HEAD_DIM, TIER>), grid, WARP * WARPS_PER_BLOCK, 0,
                       cuda_stream, p, books, plan, tier);
      });
    });
  }
  return launch_error();
}

}  // namespace smartkv

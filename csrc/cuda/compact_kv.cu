// compact_kv on CUDA. A plan says for every record that moves from where it comes; then, tier after
// tier in ascending bits, survivors close the holes and demoted records are encoded behind them: a
// demotion reads a tier that is still as it was.
#include <algorithm>

#include "cuda_ops.h"
#include "record_io.h"

namespace smartkv {
namespace {

constexpr int PLAN_THREADS = 256;
constexpr int PLAN_WARPS = PLAN_THREADS / WARP;
constexpr int WARPS_PER_BLOCK = 4;
constexpr int MAX_BLOCKS_PER_HEAD = 256;

// What becomes of the records of each head and tier `t`, its list = head * num_tiers + t.
struct Plan {
  int32_t* holes;      // [lists, capacity]: slots below the new end that are free, ascending
  int32_t* survivors;  // [lists, capacity]: records above it that stay, descending
  int32_t* demoted;    // [lists, capacity]: of tier s at its start: those for tier t, then ...
  int32_t* num_holes;  // [lists]
  int32_t* kept;       // [lists], records that stay in the tier
  int32_t* first;      // [lists, MAX_TIERS + 1]: where in `demoted` of this list those for t begin
  int64_t capacity;
};

// Kernels

// Exclusive count of `flag` over the threads of the block in order, plus `total` so far, which is
// advanced.
__device__ __forceinline__ int rank_in_block(bool flag, int32_t (&counts)[PLAN_WARPS], int& total) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned lanes = __ballot_sync(ALL_LANES, flag);
  __syncthreads();  // the counts before these have been read
  if (lane == 0) counts[warp] = __popc(lanes);
  __syncthreads();
  int rank = total + __popc(lanes & ((1u << lane) - 1));
  for (int w = 0; w < PLAN_WARPS; ++w) {
    if (w < warp) rank += counts[w];
    total += counts[w];
  }
  return rank;
}

// A block per list. grid_shape: [batch * num_kv_heads * num_tiers].
__global__ void __launch_bounds__(PLAN_THREADS) plan_compact_kernel(CompactParams p, Plan plan) {
  SMARTKV_SHARED(counts, int32_t[PLAN_WARPS]);
  const int64_t list = blockIdx.x;
  const int tier = static_cast<int>(list % p.cache.num_tiers);
  const int length = list_length(p.cache, list / p.cache.num_tiers, tier);
  const int8_t* const targets = p.targets + list * plan.capacity;
  const auto target_of = [&](int i) { return is_within(i, length) ? int{targets[i]} : -1; };
  int kept = 0;
  for (int first = 0; first < length; first += PLAN_THREADS) {
    const int i = first + static_cast<int>(threadIdx.x);
    rank_in_block(target_of(i) == tier, counts, kept);
  }
  int holes = 0, survivors = 0;
  for (int first = 0; first < length; first += PLAN_THREADS) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool stays = target_of(i) == tier, is_hole = i < kept && !stays;
    const int hole = rank_in_block(is_hole, counts, holes);
    if (is_hole) plan.holes[list * plan.capacity + hole] = i;
    // As many survivors lie behind the end as there are holes before it: the k-th from above
    // fills the k-th hole. From above, because that is the order that the CPU kernels have.
    const int last = length - 1 - i;
    const bool moves = last >= kept && target_of(last) == tier;
    const int survivor = rank_in_block(moves, counts, survivors);
    if (moves) plan.survivors[list * plan.capacity + survivor] = last;
  }
  int demoted = 0;
  for (int t = 0; t < tier; ++t) {
    if (threadIdx.x == 0) plan.first[list * (MAX_TIERS + 1) + t] = demoted;
    for (int first = 0; first < length; first += PLAN_THREADS) {
      const int i = first + static_cast<int>(threadIdx.x);
      const bool falls = target_of(i) == t;
      const int rank = rank_in_block(falls, counts, demoted);
      if (falls) plan.demoted[list * plan.capacity + rank] = i;
    }
  }
  if (threadIdx.x != 0) return;
  plan.first[list * (MAX_TIERS + 1) + tier] = demoted;
  plan.num_holes[list] = holes;
  plan.kept[list] = kept;
}

// The bytes of a record to another slot, by one warp.
__device__ __forceinline__ void copy_record(const PageLayout& layout, uint8_t* to, int to_slot,
                                            const uint8_t* from, int from_slot) {
  const int lane = threadIdx.x % WARP;
  for (int kind = 0; kind < 2; ++kind) {
    int64_t start = kind == 0 ? layout.k_codes : layout.v_codes;
    if (layout.bits == 16) {
      const int words = layout.head_dim * layout.itemsize / 4;
      auto* const out = reinterpret_cast<unsigned*>(to + start) + to_slot * words;
      const auto* const in = reinterpret_cast<const unsigned*>(from + start) + from_slot * words;
      for (int i = lane; i < words; i += WARP) out[i] = in[i];
      continue;
    }
    const Planes planes = code_planes(layout.bits);
    for (int i = 0; i < planes.count; ++i) {
      const int lanes = plane_lanes(layout.head_dim, planes.width[i]);
      for (int j = lane; j < lanes; j += WARP) {
        if (kind == 0) {
          to[start + k_lane_offset(lanes, to_slot, j)] =
              from[start + k_lane_offset(lanes, from_slot, j)];
        } else {
          to[start + v_lane_offset(lanes, to_slot, j)] =
              from[start + v_lane_offset(lanes, from_slot, j)];
        }
      }
      start += PAGE_SIZE * lanes;
    }
    const int64_t scale = kind == 0 ? layout.k_scale : layout.v_scale;
    if (lane == kind) {
      reinterpret_cast<uint16_t*>(to + scale)[to_slot] =
          reinterpret_cast<const uint16_t*>(from + scale)[from_slot];
    }
  }
  if (lane == 2) {
    write_label(to, layout, to_slot,
                reinterpret_cast<const int32_t*>(from + layout.position)[from_slot],
                reinterpret_cast<const uint16_t*>(from + layout.score)[from_slot]);
  }
}

// Fills the holes of one tier, a warp per record. grid_shape: [blocks, batch * num_kv_heads].
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK, 6)
    close_holes_kernel(CompactParams p, Plan plan, int tier) {
  const PagedKV& cache = p.cache;
  const int64_t head = blockIdx.y, list = head * cache.num_tiers + tier;
  const PageLayout layout =
      page_layout(cache.tier_bits[tier], cache.head_dim, dtype_size(cache.raw_dtype));
  const int first = static_cast<int>(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / WARP;
  for (int i = first; i < plan.num_holes[list]; i += gridDim.x * WARPS_PER_BLOCK) {
    const int to = plan.holes[list * plan.capacity + i];
    const int from = plan.survivors[list * plan.capacity + i];
    copy_record(layout, page_of(cache, head, tier, to), to % PAGE_SIZE,
                page_of(cache, head, tier, from), from % PAGE_SIZE);
  }
}

// Re-encodes a record of `from` bits for a page of TO bits; quantised ones stay rotated.
template <int HEAD_DIM, int TO>
__device__ __forceinline__ void demote_record(const PagedKV& cache, int64_t head, int from_bits,
                                              const uint8_t* from, int from_slot,
                                              const Codebook& from_book, uint8_t* to, int to_slot,
                                              const Codebook& to_book, CodeScratch& scratch) {
  if (from_bits == 16) {
    const int64_t row = int64_t{HEAD_DIM} * dtype_size(cache.raw_dtype);
    const uint8_t* const values = from + (is_value_half() ? PAGE_SIZE * row : 0) + from_slot * row;
    write_row<HEAD_DIM, TO>(to, to_slot, to_book, cache.levels,
                            reinterpret_cast<const char*>(values), cache.raw_dtype,
                            cache.k_mean + head * HEAD_DIM, scratch);
    return;
  }
  HeadRow<HEAD_DIM> row;
  if (from_bits == 3) row = read_codes<HEAD_DIM, 3>(from, from_slot, from_book);
  if (from_bits == 4) row = read_codes<HEAD_DIM, 4>(from, from_slot, from_book);
  if (from_bits == 8) row = read_codes<HEAD_DIM, 8>(from, from_slot, from_book);
  write_codes<HEAD_DIM, TO>(to, to_slot, to_book, cache.levels, row, scratch);
}

// Encodes what falls to one tier, those of the highest tier first, behind its survivors; then the
// list has its new length. A warp per record. grid_shape: [blocks, batch * num_kv_heads].
template <int HEAD_DIM>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK, 2)
    demote_kernel(CompactParams p, Codebooks codebooks, Plan plan, int tier) {
  SMARTKV_SHARED(scratch, CodeScratch[WARPS_PER_BLOCK]);
  SMARTKV_SHARED(books, Codebooks);
  const PagedKV& cache = p.cache;
  const int64_t head = blockIdx.y, first_list = head * cache.num_tiers;
  if (threadIdx.x == 0) books = codebooks;
  __syncthreads();
  const int warp = threadIdx.x / WARP, bits = cache.tier_bits[tier];
  const PageLayout layout = page_layout(bits, HEAD_DIM, dtype_size(cache.raw_dtype));
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
      SMARTKV_BITS_SWITCH(bits, [&] {
        if constexpr (BITS < 16) {
          demote_record<HEAD_DIM, BITS>(cache, head, cache.tier_bits[source], from, from_slot,
                                        books.of_tier[source], to, to_slot, books.of_tier[tier],
                                        scratch[warp]);
        }
      });
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
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(cache.batch * cache.num_kv_heads));
  for (int tier = 0; tier < cache.num_tiers; ++tier) {
    SMARTKV_LAUNCH(close_holes_kernel, grid, WARP * WARPS_PER_BLOCK, 0, cuda_stream, p, plan, tier);
    SMARTKV_HEAD_DIM_SWITCH(cache.head_dim, [&] {
      SMARTKV_LAUNCH(demote_kernel<HEAD_DIM>, grid, WARP * WARPS_PER_BLOCK, 0, cuda_stream, p,
                     books, plan, tier);
    });
  }
  return launch_error();
}

}  // namespace smartkv

// append_kv on CUDA: one kernel gives every token its slot, another writes the records.
#include <algorithm>

#include "cuda_ops.h"
#include "record_io.h"

namespace smartkv {
namespace {

constexpr int PLAN_THREADS = 128;
constexpr int PLAN_WARPS = PLAN_THREADS / WARP;
constexpr int WARPS_PER_BLOCK = 4;

// Per multiprocessor: see quantize_kv.cu.
constexpr int append_blocks(int head_dim) {
  return paley_order(head_dim) > 1 ? 2 : head_dim > 128 ? 3 : 4;
}

// Kernels

// slots[token]: index in the list of its tier, -1: none. Advances cache_seqlens. A block per head.
// grid_shape: [batch * num_kv_heads].
__global__ void __launch_bounds__(PLAN_THREADS) plan_append_kernel(AppendParams p, int32_t* slots) {
  SMARTKV_SHARED(lengths, int32_t[MAX_TIERS]);
  SMARTKV_SHARED(counts, int32_t[PLAN_WARPS][MAX_TIERS]);
  const PagedKV& cache = p.cache;
  const int64_t head = blockIdx.x;
  int32_t* const cache_lengths = cache.cache_seqlens + head * cache.num_tiers;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (threadIdx.x < static_cast<unsigned>(cache.num_tiers)) {
    lengths[threadIdx.x] = list_length(cache, head, static_cast<int>(threadIdx.x));
  }
  for (int64_t first = 0; first < p.new_len; first += PLAN_THREADS) {
    const int64_t i = first + threadIdx.x;
    int tier = is_within(i, p.new_len) ? p.tiers[head * p.new_len + i] : -1;
    if (!is_within(tier, cache.num_tiers)) tier = -1;
    unsigned mine = 0;
    for (int t = 0; t < cache.num_tiers; ++t) {
      const unsigned lanes = __ballot_sync(ALL_LANES, tier == t);
      if (tier == t) mine = lanes;
      if (lane == t) counts[warp][t] = __popc(lanes);
    }
    __syncthreads();
    if (tier < 0 && is_within(i, p.new_len)) slots[head * p.new_len + i] = -1;
    if (tier >= 0) {
      int32_t slot = lengths[tier] + __popc(mine & ((1u << lane) - 1));
      for (int w = 0; w < warp; ++w) slot += counts[w][tier];
      const bool has_room =
          cache.num_pages[tier] > 0 && is_within(int64_t{slot}, cache.max_pages * PAGE_SIZE);
      slots[head * p.new_len + i] = has_room ? slot : -1;
    }
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(cache.num_tiers)) {
      for (int w = 0; w < PLAN_WARPS; ++w) lengths[threadIdx.x] += counts[w][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.x < static_cast<unsigned>(cache.num_tiers)) {
    const int64_t most = cache.num_pages[threadIdx.x] > 0 ? cache.max_pages * PAGE_SIZE : 0;
    cache_lengths[threadIdx.x] = static_cast<int32_t>(min(int64_t{lengths[threadIdx.x]}, most));
  }
}

// A warp per token. grid_shape: [min(tokens / 4, most_blocks())].
template <int HEAD_DIM>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK, append_blocks(HEAD_DIM))
    append_kv_kernel(AppendParams p, Codebooks codebooks, const int32_t* __restrict__ slots) {
  SMARTKV_SHARED(scratch, CodeScratch[WARPS_PER_BLOCK]);
  SMARTKV_SHARED(books, Codebooks);
  const PagedKV& cache = p.cache;
  if (threadIdx.x == 0) books = codebooks;
  __syncthreads();
  const int warp = threadIdx.x / WARP;
  const int64_t tokens = int64_t{cache.batch} * cache.num_kv_heads * p.new_len;
  const int64_t step = int64_t{gridDim.x} * WARPS_PER_BLOCK;
  for (int64_t i = int64_t{blockIdx.x} * WARPS_PER_BLOCK + warp; i < tokens; i += step) {
    const int tier = p.tiers[i];
    if (slots[i] < 0) continue;
    const int64_t head = i / p.new_len, n = i % p.new_len;
    const int64_t b = head / cache.num_kv_heads, h = head % cache.num_kv_heads;
    const int kind = cache.tier_bits[tier], slot = slots[i] % PAGE_SIZE;
    uint8_t* const page = page_of(cache, head, tier, slots[i]);
    const char* const row = is_value_half() ? row_of(p.v, b, h, n) : row_of(p.k, b, h, n);
    SMARTKV_TIER_SWITCH(kind, [&] {
      write_row<HEAD_DIM, TIER>(page, slot, books.of_tier[tier], cache.levels, row, p.k.dtype,
                                shift_of_head(cache.k_mean, cache.turns, head, HEAD_DIM),
                                p.positions[i], scratch[warp]);
    });
    if (threadIdx.x % WARP == 0) {
      write_label(page, page_layout(kind, HEAD_DIM, dtype_size(cache.raw_dtype)), slot,
                  p.positions[i], score_bits(p.scores[i]));
    }
  }
}

// Kernel launchers

int64_t num_tokens(const AppendParams& p) {
  return int64_t{p.cache.batch} * p.cache.num_kv_heads * p.new_len;
}

}  // namespace

size_t append_kv_workspace(const AppendParams& p) { return num_tokens(p) * sizeof(int32_t); }

const char* append_kv_cuda(const AppendParams& p, void* workspace, void* stream) {
  const int64_t tokens = num_tokens(p);
  if (tokens == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const PagedKV& cache = p.cache;
  int32_t* const slots = static_cast<int32_t*>(workspace);
  const auto heads = static_cast<unsigned>(cache.batch * cache.num_kv_heads);
  SMARTKV_LAUNCH(plan_append_kernel, heads, PLAN_THREADS, 0, cuda_stream, p, slots);
  const int64_t blocks = (tokens + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK;
  const auto grid = static_cast<unsigned>(std::min(blocks, most_blocks()));
  const Codebooks books = make_codebooks(cache.tier_bits, cache.num_tiers, cache.levels);
  SMARTKV_HEAD_DIM_SWITCH(cache.head_dim, [&] {
    SMARTKV_LAUNCH(append_kv_kernel<HEAD_DIM>, grid, WARP * WARPS_PER_BLOCK, 0, cuda_stream, p,
                   books, slots);
  });
  return launch_error();
}

}  // namespace smartkv

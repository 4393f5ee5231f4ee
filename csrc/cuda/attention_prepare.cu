// First kernel of decode_attention and attention_mass: the work list from the lengths on the
// device, and the queries, rotated and plain, as operands of the tensor cores.
#include <algorithm>

#include "attention_run.h"

namespace smartkv {
namespace {

constexpr int ROWS_PER_BLOCK = ATTENTION_THREADS / HALF_WARP;
constexpr int MOST_BLOCKS_PER_MULTIPROCESSOR = 4;

// Kernels

// cost_before, by one warp.
__device__ __forceinline__ void plan(const AttentionRun& run) {
  const int lane = threadIdx.x % WARP;
  int64_t before = 0;
  for (int64_t first = 0; first < run.heads; first += WARP) {
    const int64_t head = first + lane;
    int64_t sum = is_within(head, run.heads) ? head_cost(run.p, head) : 0;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
      const int64_t other = __shfl_up_sync(ALL_LANES, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (is_within(head, run.heads)) run.cost_before[head + 1] = before + sum;
    before += __shfl_sync(ALL_LANES, sum, WARP - 1);
  }
  if (lane == 0) run.cost_before[0] = 0;
}

template <int HEAD_DIM>
__device__ __forceinline__ void store_plain(const AttentionRun& run, int64_t at,
                                            const HeadRow<HEAD_DIM>& q) {
  uint16_t* const to = run.plain + at * run.num_terms * HEAD_DIM;
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
    const int c = static_cast<int>(threadIdx.x) % HALF_WARP + HALF_WARP * r;
    if (run.p.q.dtype == DType::FLOAT16) {
      to[c] = __half_as_ushort(__float2half_rn(q.at[r]));
      continue;
    }
    uint16_t terms[MAX_TERMS];
    split_bf16(q.at[r], terms);
#pragma unroll
    for (int term = 0; term < MAX_TERMS; ++term) {
      if (term < run.num_terms) to[term * HEAD_DIM + c] = terms[term];
    }
  }
}

// Products of the row at `at` with the vectors that turn. Shuffles: all lanes of the warp come
// here.
template <int HEAD_DIM>
__device__ __forceinline__ void store_turns(const AttentionRun& run, int64_t head, int64_t at,
                                            bool is_query, const HeadRow<HEAD_DIM>& q) {
  const PagedKV& cache = run.p.cache;
  const int lane = threadIdx.x % HALF_WARP, count = 2 * cache.turns.count;
  const int64_t row = at % run.rows_per_block, unit = at / run.rows_per_block;
  // Rows that fill up a block, and lanes behind the last, have a head that may not exist.
  const int64_t known = is_query ? head : 0;
  const __half* vector = reinterpret_cast<const __half*>(
      shift_of_head(cache.k_mean, cache.turns, known, HEAD_DIM).vectors);
  for (int i = 0; i < count; ++i, vector += HEAD_DIM) {
    float dot = 0;
#pragma unroll
    for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
      dot = fmaf(q.at[r], to_float(vector[lane + HALF_WARP * r]), dot);
    }
    dot = sum_lanes<HALF_WARP>(dot) * (run.p.softmax_scale * LOG2_E);
    if (lane == 0 && is_within(at, run.units * run.rows_per_block)) {
      run.row_turns[(unit * count + i) * run.rows_per_block + row] = dot;
    }
  }
}

// Half a warp per row, block 0 plans. grid_shape: [1 + units * rows_per_block / 8].
template <int HEAD_DIM>
__global__ void __launch_bounds__(ATTENTION_THREADS) prepare_kernel(AttentionRun run) {
  if (blockIdx.x == 0) {
    if (threadIdx.x < WARP) plan(run);
    return;
  }
  const DecodeAttentionParams& p = run.p;
  const int64_t at = (int64_t{blockIdx.x} - 1) * ROWS_PER_BLOCK + threadIdx.x / HALF_WARP;
  const bool exists = is_within(at, run.units * run.rows_per_block);
  const int64_t unit = at / run.rows_per_block, head = unit / run.row_blocks;
  const int row =
      static_cast<int>(unit % run.row_blocks * run.rows_per_block + at % run.rows_per_block);
  const bool is_query = exists && is_within(row, run.num_rows);
  const int groups = p.num_heads / p.cache.num_kv_heads, lane = threadIdx.x % HALF_WARP;
  const int64_t b = head / p.cache.num_kv_heads, h = head % p.cache.num_kv_heads;
  HeadRow<HEAD_DIM> q{};
  float bias = 0, poison = 0;
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
    const int c = lane + HALF_WARP * r;
    if (is_query)
      q.at[r] = load_value(row_of(p.q, b, h * groups + row % groups, row / groups), p.q.dtype, c);
    poison = fmaf(q.at[r], 0.0f, poison);
    if (is_query && p.cache.num_tiers > 0) {
      bias = fmaf(q.at[r], p.cache.k_mean[head * HEAD_DIM + c], bias);
    }
  }
  bias = sum_lanes<HALF_WARP>(bias) * (p.softmax_scale * LOG2_E);
  if (p.cache.turns.count > 0) store_turns(run, head, at, is_query, q);
  poison = sum_lanes<HALF_WARP>(poison);
  if (exists) store_plain(run, at, q);
  float top = 0;
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
    q.at[r] *= p.softmax_scale * LOG2_E;
    if (is_query && p.cache.turns.weights != nullptr) {
      q.at[r] /= p.cache.turns.weights[head * HEAD_DIM + lane + HALF_WARP * r];
    }
  }
  rotate(q, false);
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) top = fmaxf(top, fabsf(q.at[r]));
  top = max_lanes<HALF_WARP>(top);
  // A power of two that makes the row at most 1.
  const int exponent = top > 0 ? static_cast<int>(__float_as_uint(top) >> 23) - 126 : 0;
  const float down = exp2f(static_cast<float>(-exponent));
  if (!exists) return;
  uint16_t* const rotated = run.rotated + at * 2 * HEAD_DIM;
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
    const int c = lane + HALF_WARP * r;
    // Channels 0 and 2 of four, then 1 and 3, lie together: see code_tile.h.
    const int to = (c & ~3) | (c & 1) << 1 | (c >> 1 & 1);
    const float x = q.at[r] * down;
    const __half high = __float2half_rn(x), low = __float2half_rn(x - to_float(high));
    rotated[to] = __half_as_ushort(high);
    rotated[HEAD_DIM + to] = __half_as_ushort(low);
  }
  if (lane != 0) return;
  run.row_scale[at] = exp2f(static_cast<float>(exponent));
  run.row_bias[at] = bias;
  run.poison[at] = poison;
}

// Kernel launchers

LevelBytes level_bytes(int bits, Levels levels) {
  LevelBytes bytes{};
  if (bits > 4) return bytes;
  const Codebook book = make_codebook(bits, levels);
  for (int i = 0; i < 8; ++i) {
    const auto put = [&](unsigned (&words)[2], float value) {
      words[i / 4] |= static_cast<unsigned>(value) << i % 4 * 8;
    };
    put(bytes.low, bits == 4 ? -book.level[i] : 128 + book.level[i]);
    if (bits == 4) put(bytes.high, book.level[8 + i]);
  }
  return bytes;
}

bool is_aligned(const HeadsView& x) {
  const int64_t size = dtype_size(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_b * size % 16 == 0 &&
         x.stride_h * size % 16 == 0 && x.stride_n * size % 16 == 0;
}

}  // namespace

// Fills a run; returns the bytes of the workspace that it points into.
static size_t fill_run(const DecodeAttentionParams& p, uintptr_t workspace, AttentionRun& run) {
  const int64_t head_dim = p.cache.head_dim;
  run.p = p;
  run.num_rows = static_cast<int>(p.num_heads / p.cache.num_kv_heads * p.q_len);
  // Two row tiles of float32, of 256 channels or with the odd planes of 80 would not fit into the
  // registers.
  const bool one_tile = run.num_rows <= 8 || !has_two_row_tiles(static_cast<int>(head_dim)) ||
                        p.q.dtype == DType::FLOAT32;
  run.rows_per_block = one_tile ? 8 : 16;
  run.row_blocks = (run.num_rows + run.rows_per_block - 1) / run.rows_per_block;
  run.heads = int64_t{p.cache.batch} * p.cache.num_kv_heads;
  run.units = run.heads * run.row_blocks;
  const int64_t window_tiles = (p.window_len + PAGE_SIZE - 1) / PAGE_SIZE;
  const int64_t most_tiles = run.units * (p.cache.num_tiers * p.cache.max_pages + window_tiles);
  const int64_t blocks =
      int64_t{MOST_BLOCKS_PER_MULTIPROCESSOR} * device_attribute(cudaDevAttrMultiProcessorCount);
  run.num_parts = static_cast<int>(std::max<int64_t>(1, std::min(blocks, most_tiles)));
  run.num_terms = p.q.dtype == DType::FLOAT32 ? MAX_TERMS : 1;
  run.precise = p.precision == Precision::FLOAT32 || p.precision == Precision::INT16;
  run.copies_window = is_aligned(p.k_window) && (p.out == nullptr || is_aligned(p.v_window));
  for (int t = 0; t < p.cache.num_tiers; ++t) {
    run.k_levels[t] = level_bytes(k_bits_of(p.cache.tier_bits[t]), p.cache.levels);
    run.v_levels[t] = level_bytes(v_bits_of(p.cache.tier_bits[t]), p.cache.levels);
  }
  const int64_t rows = run.units * run.rows_per_block;
  const int64_t part_rows = (run.units + run.num_parts) * run.rows_per_block;
  uintptr_t next = workspace;
  const auto take = [&]<typename T>(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(next);
    next += (count * sizeof(T) + 15) / 16 * 16;
  };
  take(run.cost_before, run.heads + 1);
  take(run.rotated, rows * 2 * head_dim);
  take(run.plain, rows * run.num_terms * head_dim);
  take(run.row_scale, rows);
  take(run.row_bias, rows);
  take(run.row_turns, rows * 2 * p.cache.turns.count);
  take(run.poison, rows);
  take(run.part_max, part_rows);
  take(run.part_sum, part_rows);
  take(run.part_o, p.out == nullptr ? 0 : part_rows * head_dim);
  return next - workspace;
}

AttentionRun make_run(const DecodeAttentionParams& p, void* workspace) {
  AttentionRun run{};
  fill_run(p, reinterpret_cast<uintptr_t>(workspace), run);
  return run;
}

size_t attention_workspace(const DecodeAttentionParams& p) {
  AttentionRun run{};
  return fill_run(p, 0, run);
}

void launch_prepare(const AttentionRun& run, cudaStream_t stream) {
  const int64_t rows = run.units * run.rows_per_block;
  const auto grid = static_cast<unsigned>(1 + (rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK);
  SMARTKV_HEAD_DIM_SWITCH(run.p.cache.head_dim, [&] {
    SMARTKV_LAUNCH(prepare_kernel<HEAD_DIM>, grid, ATTENTION_THREADS, 0, stream, run);
  });
}

}  // namespace smartkv

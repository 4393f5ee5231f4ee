// What the kernels of decode_attention and attention_mass share: the work list, the queries as the
// tensor cores take them, and the partial results.
//
// Rows are the queries of one KV head: row r = query r / groups of query head r % groups. A row
// block is up to 8 or 16 of them; (head, row block) is a unit of work, and a tile 64 keys of it: a
// page of a tier, or slots of the window. Units lie one behind the other on a line of costs, which
// the blocks cut into equal parts.
#pragma once

#include "record_io.h"

namespace smartkv {

constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = WARP * ATTENTION_WARPS;
constexpr int WARP_TOKENS = PAGE_SIZE / ATTENTION_WARPS;  // a quarter of each tile
constexpr int MAX_TERMS = 3;                              // float32 = a sum of three bfloat16
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

constexpr bool has_two_row_tiles(int head_dim) { return head_dim <= 128 && head_dim != 80; }

// Levels of a tier as bytes, for lookups by permute_bytes. 4 bits: magnitudes of the levels of
// codes 0 to 7 (negative) and 8 to 15. Fewer: level + 128.
struct LevelBytes {
  unsigned low[2], high[2];
};

struct AttentionRun {
  DecodeAttentionParams p;
  int num_rows, rows_per_block, row_blocks;
  int64_t heads, units;  // (sequence, KV head); (head, row block)
  int num_parts;         // blocks of the grid
  int num_terms;         // of a value of the dense part: 1, or 3 for float32
  bool precise;          // rotated queries and probabilities in two terms
  bool copies_window;    // its rows are aligned to 16 bytes
  LevelBytes k_levels[MAX_TIERS], v_levels[MAX_TIERS];
  int64_t* cost_before;  // [heads + 1], in tiles weighted by their time
  uint16_t* rotated;     // [units, rows_per_block, 2, head_dim] float16: high and low term
  uint16_t* plain;       // [units, rows_per_block, num_terms, head_dim] of the window's kind
  float* row_scale;      // [units, rows_per_block] of the rotated row
  float* row_bias;       // [units, rows_per_block]: q . k_mean
  float* row_turns;      // [units, turns, 2, rows_per_block]: q . U and q . V
  float* poison;         // [units, rows_per_block]: NaN where the query is not finite, else 0
  float* part_o;         // [num_parts + units, rows_per_block, head_dim], unnormalised
  float* part_max;       // [num_parts + units, rows_per_block], in powers of two
  float* part_sum;       // [num_parts + units, rows_per_block]
};

// Keys of a head in a tier; tier num_tiers is the window.
__device__ __forceinline__ int64_t tier_length(const DecodeAttentionParams& p, int64_t head,
                                               int tier) {
  if (tier == p.cache.num_tiers) return p.window_len;
  return list_length(p.cache, head, tier);
}

__device__ __forceinline__ int64_t tier_tiles(const DecodeAttentionParams& p, int64_t head,
                                              int tier) {
  return (tier_length(p, head, tier) + PAGE_SIZE - 1) / PAGE_SIZE;
}

// Of a tile, in bits of a key and a value and a constant part.
__device__ __forceinline__ int tile_cost(const DecodeAttentionParams& p, int tier) {
  return 8 + (tier == p.cache.num_tiers ? 32 : bits_of_pair(p.cache.tier_bits[tier]));
}

__device__ __forceinline__ int64_t head_cost(const DecodeAttentionParams& p, int64_t head) {
  int64_t cost = 0;
  for (int t = 0; t <= p.cache.num_tiers; ++t) cost += tier_tiles(p, head, t) * tile_cost(p, t);
  return cost;
}

// Where part i begins on the line of all costs.
__device__ __forceinline__ int64_t part_begin(const AttentionRun& run, int64_t i) {
  return run.cost_before[run.heads] * run.row_blocks * i / run.num_parts;
}

// The unit that a cost lies in; head is found by bisection.
struct Unit {
  int64_t index, head, begin, cost;
  int row_block;
};

__device__ __forceinline__ Unit unit_of_head(const AttentionRun& run, int64_t head, int row_block) {
  const int64_t cost = run.cost_before[head + 1] - run.cost_before[head];
  return {head * run.row_blocks + row_block, head,
          run.cost_before[head] * run.row_blocks + cost * row_block, cost, row_block};
}

__device__ __forceinline__ Unit unit_at(const AttentionRun& run, int64_t position) {
  int64_t low = 0, high = run.heads;
  while (high - low > 1) {  // cost_before[low] * row_blocks <= position < that of high
    const int64_t middle = (low + high) / 2;
    (run.cost_before[middle] * run.row_blocks <= position ? low : high) = middle;
  }
  const int64_t cost = run.cost_before[low + 1] - run.cost_before[low];
  const int64_t row_block = (position - run.cost_before[low] * run.row_blocks) / cost;
  return unit_of_head(run, low, static_cast<int>(row_block));
}

// Positions that a row sees, [low, high]; none for the rows that fill up a block.
struct Span {
  int low, high;
};

// On the device, where no host checks it: a step that is replayed finds the position of its token.
__device__ __forceinline__ int64_t first_position(const DecodeAttentionParams& p) {
  return clamp_to(int64_t{0}, *p.q_start, INT32_MAX - p.q_len);
}

__device__ __forceinline__ Span span_of_row(const AttentionRun& run, int row) {
  const DecodeAttentionParams& p = run.p;
  if (!is_within(row, run.num_rows)) return {0, -1};
  const int64_t position = first_position(p) + row / (p.num_heads / p.cache.num_kv_heads);
  const int64_t low = p.sliding_window > 0 ? position - p.sliding_window + 1 : 0;
  return {static_cast<int>(low > 0 ? low : 0), static_cast<int>(position)};
}

// What any row of a block sees.
__device__ __forceinline__ Span span_of_block(const AttentionRun& run, int row_block) {
  const int first = row_block * run.rows_per_block;
  const int last = min(first + run.rows_per_block, run.num_rows) - 1;
  return {span_of_row(run, first).low, span_of_row(run, last).high};
}

__device__ __forceinline__ bool sees(Span span, int position) {
  return position >= span.low && position <= span.high;
}

// Index of a row in lse, and times head_dim in out.
__device__ __forceinline__ int64_t output_row(const DecodeAttentionParams& p, int64_t head,
                                              int row) {
  const int groups = p.num_heads / p.cache.num_kv_heads;
  return (head * groups + row % groups) * p.q_len + row / groups;
}

// Terms of a float32 as bfloat16, exact for three of them.
__device__ __forceinline__ void split_bf16(float x, uint16_t (&terms)[MAX_TERMS]) {
#pragma unroll
  for (int i = 0; i < MAX_TERMS; ++i) {
    const __nv_bfloat16 term = __float2bfloat16_rn(x);
    terms[i] = __bfloat16_as_ushort(term);
    x -= to_float(term);
  }
}

// Kernel launchers that several files use. Sizes depend on shapes alone, never on lengths.
size_t attention_workspace(const DecodeAttentionParams& p);
// What the workspace holds, and how much it is.
AttentionRun make_run(const DecodeAttentionParams& p, void* workspace);
// Queries and work list; then out and lse.
void launch_prepare(const AttentionRun& run, cudaStream_t stream);
void launch_attention(const AttentionRun& run, cudaStream_t stream);
// p.mass and p.window_mass from p.lse.
void launch_mass(const AttentionRun& run, cudaStream_t stream);

}  // namespace smartkv

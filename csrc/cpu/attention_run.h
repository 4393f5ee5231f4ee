// One call of attention and its scratch memory.
#pragma once

namespace smartkv::SMARTKV_ISA {

// One call: the parameters and all scratch memory.
struct AttentionRun {
  const DecodeAttentionParams& p;
  const AttentionPlan& plan;
  const TierCodecs& codecs;
  char* memory;
  int64_t rows, groups;  // per kv head; of one query. Kept: they are divisions
  bool rotated;          // some tier is quantised
  int64_t max_tiles;     // of a head
  char* shares;          // Shares of all tiles, or null
};

SMARTKV_INLINE int64_t query_of_row(const AttentionRun& run, int64_t row) {
  return run.p.q_len == 1 ? 0 : row / run.groups;
}

// Scratch of one part.
struct Workspace {
  Queries queries;
  ProbabilityDigits weights;
  float* k_tile;
  float* v_tile;
  float* scores;  // [ROW_BLOCK, 64]
};

SMARTKV_INLINE int64_t align_up(int64_t floats) { return (floats + 15) / 16 * 16; }

// Hands out consecutive 64-byte aligned arrays; with a null base it only counts.
struct Carver {
  char* base;
  int64_t bytes = 0;

  template <class T>
  SMARTKV_INLINE T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
};

inline Workspace carve_workspace(const DecodeAttentionParams& p, Carver& memory) {
  const int64_t rows = num_rows(p), values = rows * p.cache.head_dim;
  const int64_t tile = tile_floats(p.cache.head_dim);
  Workspace w;
  w.queries.plain = memory.take<float>(values);
  w.queries.rotated = memory.take<float>(values);
  w.queries.bias = memory.take<float>(rows);
  w.queries.turns = memory.take<float>(rows * 2 * p.cache.turns.count);
  w.queries.poison = memory.take<float>(rows);
  w.queries.ints.digits = memory.take<int8_t>(MAX_DIGITS * values);
  for (float*& scale : w.queries.ints.scale) scale = memory.take<float>(rows);
  w.queries.ints.start = memory.take<int32_t>(MAX_DIGITS * rows);
  w.weights.digits = memory.take<uint8_t>(MAX_DIGITS * PROBABILITY_PLANE);
  w.weights.scale = memory.take<float>(BATCH_TILES * ROW_BLOCK);
  w.scores = memory.take<float>(ROW_BLOCK * PAGE_SIZE);
  // A single row block is done with K before it needs V: one buffer stays in the first cache.
  w.k_tile = memory.take<float>(tile);
  w.v_tile = rows <= ROW_BLOCK ? w.k_tile : memory.take<float>(tile);
  return w;
}

inline int64_t workspace_bytes(const DecodeAttentionParams& p) {
  Carver counter{nullptr};
  carve_workspace(p, counter);
  return counter.bytes;
}

inline int64_t state_floats(const DecodeAttentionParams& p) {
  const int64_t rows = align_up(num_rows(p));
  return (p.out == nullptr ? 0 : rows * p.cache.head_dim) + 2 * rows;
}

inline Workspace workspace_of(const AttentionRun& run, int64_t part) {
  Carver memory{run.memory + part * workspace_bytes(run.p)};
  return carve_workspace(run.p, memory);
}

inline State state_of(const AttentionRun& run, int64_t slot) {
  const int64_t rows = align_up(run.rows);
  float* x = reinterpret_cast<float*>(run.memory + run.plan.parts * workspace_bytes(run.p)) +
             slot * state_floats(run.p);
  const bool has_output = run.p.out != nullptr;
  float* max = x + (has_output ? rows * run.p.cache.head_dim : 0);
  return {has_output ? x : nullptr, max, max + rows};
}

inline Feed feed_of(const AttentionRun& run, int64_t part, int ahead) {
  const Piece* pieces = run.plan.pieces;
  return {run.p, pieces + run.plan.part_begin[part], pieces + run.plan.part_begin[part + 1], ahead,
          run.plan.bytes_per_cost};
}

SMARTKV_INLINE State state_row(State state, int64_t row, int head_dim) {
  return {state.o == nullptr ? nullptr : state.o + row * head_dim, state.max + row,
          state.sum + row};
}

struct RowBlock {
  int64_t begin;
  int count;
};

template <class Body>
SMARTKV_INLINE void for_row_blocks(int64_t rows, const Body& body) {
  for (int64_t begin = 0; begin < rows; begin += ROW_BLOCK) {
    const int64_t left = rows - begin;
    body(RowBlock{begin, static_cast<int>(left < ROW_BLOCK ? left : ROW_BLOCK)});
  }
}

inline bool has_quantised_tier(const PagedKV& cache) {
  for (int t = 0; t < cache.num_tiers; ++t) {
    if (cache.tier_bits[t] != 16) return true;
  }
  return false;
}

// Few rows keep their exponentials for the mass; for many it is less work to multiply K again.
constexpr int SHARED_ROWS = 16;
SMARTKV_INLINE bool keeps_shares(const DecodeAttentionParams& p) {
  return (p.mass != nullptr || p.window_mass != nullptr) && p.out != nullptr && MAX_DIGITS > 0 &&
         p.precision != Precision::FLOAT32 && num_rows(p) <= SHARED_ROWS;
}
SMARTKV_INLINE int64_t share_bytes(const DecodeAttentionParams& p) {
  return SHARED_ROWS * sizeof(float) + num_rows(p) * PAGE_SIZE * sizeof(uint16_t);
}

SMARTKV_INLINE Shares shares_of(const AttentionRun& run, int64_t head, int64_t index) {
  if (run.shares == nullptr) return {nullptr, nullptr};
  char* at = run.shares + (head * run.max_tiles + index) * share_bytes(run.p);
  return {reinterpret_cast<float*>(at),
          reinterpret_cast<uint16_t*>(at + SHARED_ROWS * sizeof(float))};
}

}  // namespace smartkv::SMARTKV_ISA

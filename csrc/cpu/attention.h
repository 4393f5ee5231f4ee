// decode_attention and attention_mass. A part walks its tiles; every tile is decoded once and used
// by all query rows of the kv head: scores = Q K, online softmax, O += P V. Pieces of a head that
// was split over the sequence are merged by log-sum-exp; a second walk computes the mass.
#pragma once

namespace smartkv::SMARTKV_ISA {

// One call: the parameters and all scratch memory.
struct AttentionRun {
  const DecodeAttentionParams& p;
  const AttentionPlan& plan;
  const TierCodecs& codecs;
  char* memory;
  bool rotated;  // some tier is quantised
};

// Scratch of one part.
struct Workspace {
  Queries queries;
  float* k_tile;
  float* v_tile;
  float* scores;  // [ROW_BLOCK, 64]
};

SMARTKV_INLINE int64_t align_up(int64_t floats) { return (floats + 15) / 16 * 16; }

inline int64_t workspace_floats(const DecodeAttentionParams& p) {
  const int64_t rows = align_up(num_rows(p)), head_dim = p.cache.head_dim;
  return 2 * rows * head_dim + rows + 2 * tile_floats(p.cache.head_dim) + ROW_BLOCK * PAGE_SIZE;
}

inline int64_t state_floats(const DecodeAttentionParams& p) {
  const int64_t rows = align_up(num_rows(p));
  return (p.out == nullptr ? 0 : rows * p.cache.head_dim) + 2 * rows;
}

inline Workspace workspace_of(const AttentionRun& run, int64_t part) {
  const int64_t rows = align_up(num_rows(run.p)), values = rows * run.p.cache.head_dim;
  float* x = reinterpret_cast<float*>(run.memory) + part * workspace_floats(run.p);
  Workspace w;
  w.queries = {x, x + values, x + 2 * values};
  w.k_tile = x + 2 * values + rows;
  // A single row block is done with K before it needs V: one buffer stays in the first cache.
  const bool shared = num_rows(run.p) <= ROW_BLOCK;
  w.v_tile = w.k_tile + (shared ? 0 : tile_floats(run.p.cache.head_dim));
  w.scores = w.k_tile + 2 * tile_floats(run.p.cache.head_dim);
  return w;
}

inline State state_of(const AttentionRun& run, int64_t slot) {
  const int64_t parts = run.plan.parts;
  const int64_t rows = align_up(num_rows(run.p));
  float* x = reinterpret_cast<float*>(run.memory) + parts * workspace_floats(run.p) +
             slot * state_floats(run.p);
  const bool has_output = run.p.out != nullptr;
  float* max = x + (has_output ? rows * run.p.cache.head_dim : 0);
  return {has_output ? x : nullptr, max, max + rows};
}

SMARTKV_INLINE State state_row(State state, int64_t row, int head_dim) {
  return {state.o == nullptr ? nullptr : state.o + row * head_dim, state.max + row,
          state.sum + row};
}

struct RowBlock {
  int64_t begin;
  int count;
};

// Few rows multiply the packed codes directly.
SMARTKV_INLINE bool is_k_fused(const AttentionRun& run, const Tile& tile) {
  return tile.bits < 16 && num_rows(run.p) <= FUSED_ROWS;
}
SMARTKV_INLINE bool is_v_fused(const AttentionRun& run, const Tile& tile) {
  return is_k_fused(run, tile) && run.codecs.at[tile.ref.tier].has_aligned_v;
}

// Products of the queries of a block with a tile; false when none of them can see it.
inline bool multiply_queries(const AttentionRun& run, const Tile& tile, const Workspace& w,
                             RowBlock block) {
  const DecodeAttentionParams& p = run.p;
  const int64_t last = (block.begin + block.count - 1) / num_groups(p);
  if (span_of_query(p, last).high < tile.first_position) return false;
  const int head_dim = p.cache.head_dim;
  if (is_k_fused(run, tile)) {
    multiply_k_rows(run.codecs.at[tile.ref.tier], {tile.page, tile.next}, block.count,
                    w.queries.rotated, w.scores);
    return true;
  }
  const float* q = tile.bits == 16 ? w.queries.plain : w.queries.rotated;
  gemm<false>(
      {q + block.begin * head_dim, head_dim, w.k_tile, PAGE_SIZE, w.scores, PAGE_SIZE, head_dim},
      block.count, PAGE_SIZE);
  return true;
}

inline void attend_block(const AttentionRun& run, const Tile& tile, const Workspace& w, State state,
                         RowBlock block) {
  const DecodeAttentionParams& p = run.p;
  const int head_dim = p.cache.head_dim;
  if (!multiply_queries(run, tile, w, block)) return;
  for (int i = 0; i < block.count; ++i) {
    const int64_t row = block.begin + i;
    const float bias = tile.bits == 16 ? 0.0f : w.queries.bias[row];
    const Span span = span_of_query(p, row / num_groups(p));
    float* s = w.scores + i * PAGE_SIZE;
    const State at_row = state_row(state, row, head_dim);
    if (tile.all_visible) {
      softmax_row<false>(tile, span, bias, s, at_row, head_dim);
    } else {
      softmax_row<true>(tile, span, bias, s, at_row, head_dim);
    }
  }
  if (p.out == nullptr) return;
  if (is_v_fused(run, tile)) {
    const int64_t v_codes = v_codes_of(tile, head_dim) - tile.page;
    multiply_v_rows(run.codecs.at[tile.ref.tier], {tile.page + v_codes, tile.next + v_codes},
                    block.count, w.scores, state.o);
    return;
  }
  if (w.v_tile == w.k_tile) decode_tile_v(tile, run.codecs, head_dim, w.v_tile);
  gemm<true>({w.scores, PAGE_SIZE, w.v_tile, v_stride(head_dim), state.o + block.begin * head_dim,
              head_dim, PAGE_SIZE},
             block.count, head_dim);
}

template <class Body>
SMARTKV_INLINE void for_row_blocks(int64_t rows, const Body& body) {
  for (int64_t begin = 0; begin < rows; begin += ROW_BLOCK) {
    const int64_t left = rows - begin;
    body(RowBlock{begin, static_cast<int>(left < ROW_BLOCK ? left : ROW_BLOCK)});
  }
}

inline void rotate_back(const DecodeAttentionParams& p, State state) {
  if (p.out == nullptr) return;
  for (int64_t r = 0; r < num_rows(p); ++r) {
    rotate(state.o + r * p.cache.head_dim, p.cache.head_dim, true);
  }
}

inline void attend_piece(const AttentionRun& run, const Piece& piece, const Workspace& w,
                         State state) {
  const DecodeAttentionParams& p = run.p;
  const int64_t rows = num_rows(p);
  prepare_queries(p, piece.head, run.rotated, w.queries);
  clear_state(state, rows, p.cache.head_dim);
  bool in_rotated_space = run.rotated;
  Tile tile;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    open_tile(p, piece.head, i, tile);
    if (tile.visible == 0) continue;
    if (in_rotated_space && tile.bits == 16) {
      rotate_back(p, state);
      in_rotated_space = false;
    }
    if (!is_k_fused(run, tile)) decode_tile_k(tile, run.codecs, p.cache.head_dim, w.k_tile);
    if (p.out != nullptr && w.v_tile != w.k_tile) {
      decode_tile_v(tile, run.codecs, p.cache.head_dim, w.v_tile);
    }
    for_row_blocks(rows, [&](RowBlock block) { attend_block(run, tile, w, state, block); });
  }
  if (in_rotated_space) rotate_back(p, state);
}

inline void finish_head(const AttentionRun& run, int64_t head, State state) {
  for (int64_t r = 0; r < num_rows(run.p); ++r) {
    const State row = state_row(state, r, run.p.cache.head_dim);
    finish_row(run.p, head, r, row.o, *row.max, *row.sum);
  }
}

// Combines the pieces of a split head in the state of the first.
inline void merge_split(const AttentionRun& run, const SplitHead& split) {
  const int head_dim = run.p.cache.head_dim;
  const State into = state_of(run, run.plan.pieces[split.first_piece].state);
  for (int64_t i = 1; i < split.num_pieces; ++i) {
    const State from = state_of(run, run.plan.pieces[split.first_piece + i].state);
    for (int64_t r = 0; r < num_rows(run.p); ++r) {
      const State a = state_row(into, r, head_dim), b = state_row(from, r, head_dim);
      if (!(*b.sum > 0)) continue;
      const float top = *a.max > *b.max ? *a.max : *b.max;
      const float a_weight = ::expf(*a.max - top), b_weight = ::expf(*b.max - top);
      *a.max = top;
      *a.sum = *a.sum * a_weight + *b.sum * b_weight;
      for (int c = 0; a.o != nullptr && c < head_dim; c += 16) {
        const F scaled = load(a.o + c) * splat(a_weight);
        store(a.o + c, fma(load(b.o + c), splat(b_weight), scaled));
      }
    }
  }
  finish_head(run, split.head, into);
}

inline void add_mass_block(const AttentionRun& run, int64_t head, const Tile& tile,
                           const Workspace& w, RowBlock block, float* mass) {
  const DecodeAttentionParams& p = run.p;
  if (!multiply_queries(run, tile, w, block)) return;
  for (int i = 0; i < block.count; ++i) {
    const int64_t row = block.begin + i;
    const float lse = p.lse[output_row(p, head, row)];
    if (!(lse > -INFINITY)) continue;
    const float bias = tile.bits == 16 ? 0.0f : w.queries.bias[row];
    const Span span = span_of_query(p, row / num_groups(p));
    const float* s = w.scores + i * PAGE_SIZE;
    if (tile.all_visible) {
      add_mass_row<false>(tile, span, bias, s, lse, mass);
    } else {
      add_mass_row<true>(tile, span, bias, s, lse, mass);
    }
  }
}

// Where the mass of a tile goes; nullptr where it is not asked for.
inline float* mass_of(const DecodeAttentionParams& p, int64_t head, const TileRef& ref) {
  const int64_t first = ref.index * PAGE_SIZE;
  if (ref.tier == p.cache.num_tiers) {
    return p.window_mass == nullptr ? nullptr : p.window_mass + head * p.window_len + first;
  }
  if (p.mass == nullptr) return nullptr;
  return p.mass + (head * p.cache.num_tiers + ref.tier) * p.cache.max_pages * PAGE_SIZE + first;
}

inline void add_mass_piece(const AttentionRun& run, const Piece& piece, const Workspace& w) {
  const DecodeAttentionParams& p = run.p;
  prepare_queries(p, piece.head, run.rotated, w.queries);
  Tile tile;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    open_tile(p, piece.head, i, tile);
    float* out = mass_of(p, piece.head, tile.ref);
    if (tile.visible == 0 || out == nullptr) continue;
    alignas(64) float mass[PAGE_SIZE] = {};
    if (!is_k_fused(run, tile)) decode_tile_k(tile, run.codecs, p.cache.head_dim, w.k_tile);
    for_row_blocks(num_rows(p),
                   [&](RowBlock block) { add_mass_block(run, piece.head, tile, w, block, mass); });
    __builtin_memcpy(out, mass, tile.ref.count * sizeof(float));
  }
}

inline void attend_part(const AttentionRun& run, int64_t part) {
  const int64_t parts = run.plan.parts;
  const Workspace w = workspace_of(run, part);
  for (int64_t i = run.plan.part_begin[part]; i < run.plan.part_begin[part + 1]; ++i) {
    const Piece& piece = run.plan.pieces[i];
    const State state = state_of(run, piece.state);
    attend_piece(run, piece, w, state);
    if (piece.state < parts) finish_head(run, piece.head, state);
  }
}

inline bool has_quantised_tier(const PagedKV& cache) {
  for (int t = 0; t < cache.num_tiers; ++t) {
    if (cache.tier_bits[t] < 16) return true;
  }
  return false;
}

// With has_lse the first walk is skipped: p.lse already holds the result.
inline void run_attention(const DecodeAttentionParams& p, const Parallel& parallel, bool has_lse) {
  const int64_t parts = parallel.num_threads;
  const AttentionPlan plan(p, parts);
  const TierCodecs codecs(p.cache);
  const int64_t floats = parts * workspace_floats(p) + plan.num_states * state_floats(p);
  const Scratch memory(floats * sizeof(float));
  const AttentionRun run{p, plan, codecs, memory.data(), has_quantised_tier(p.cache)};
  if (!has_lse) {
    parallel_for(parallel, parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) attend_part(run, part);
    });
    parallel_for(parallel, plan.num_splits, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge_split(run, run.plan.splits[i]);
    });
  }
  if (p.mass == nullptr && p.window_mass == nullptr) return;
  parallel_for(parallel, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Workspace w = workspace_of(run, part);
      for (int64_t i = run.plan.part_begin[part]; i < run.plan.part_begin[part + 1]; ++i) {
        add_mass_piece(run, run.plan.pieces[i], w);
      }
    }
  });
}

inline void decode_attention(const DecodeAttentionParams& p, const Parallel& parallel) {
  run_attention(p, parallel, false);
}

// The same walks over a dense cache without V: the keys are the window.
inline void attention_mass(const AttentionMassParams& m, const Parallel& parallel) {
  DecodeAttentionParams p{};
  p.cache.batch = m.batch;
  p.cache.num_kv_heads = m.num_kv_heads;
  p.cache.head_dim = m.head_dim;
  p.q = m.q;
  p.k_window = m.k;
  p.window_positions = m.k_positions;
  p.window_mass = m.mass;
  p.num_heads = m.num_heads;
  p.q_len = m.q_len;
  p.window_len = m.kv_len;
  p.q_start = m.q_start;
  p.softmax_scale = m.softmax_scale;
  p.sliding_window = m.sliding_window;
  const int64_t rows = int64_t{m.batch} * m.num_heads * m.q_len;
  const Scratch lse(m.lse == nullptr ? rows * sizeof(float) : 0);
  p.lse = m.lse == nullptr ? reinterpret_cast<float*>(lse.data()) : const_cast<float*>(m.lse);
  run_attention(p, parallel, m.lse != nullptr);
}

}  // namespace smartkv::SMARTKV_ISA

// decode_attention and attention_mass. A part walks its tiles; every tile is decoded once and used
// by all query rows of the kv head: scores = Q K, online softmax, O += P V. Pieces of a head that
// was split over the sequence are merged by log-sum-exp; a second walk computes the mass.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Tiles that are attended together: all in one space, more than one only for few rows.
struct TileBatch {
  int64_t head;
  Tile tiles[BATCH_TILES];
  int count = 0;
};

SMARTKV_INLINE int batch_tiles(const DecodeAttentionParams& p) {
  const int64_t fit = ROW_BLOCK / num_rows(p);
  return fit < 1 ? 1 : fit < BATCH_TILES ? static_cast<int>(fit) : BATCH_TILES;
}

inline void attend_block(const AttentionRun& run, const TileBatch& tiles, const Workspace& w,
                         State state, RowBlock rows, Feed& feed) {
  const DecodeAttentionParams& p = run.p;
  const bool raw = tiles.tiles[0].is_raw(), is_single = w.v_tile == w.k_tile;
  Span spans[ROW_BLOCK];
  float bias[ROW_BLOCK];
  for (int i = 0; i < rows.count; ++i) {
    spans[i] = span_of_query(p, query_of_row(run, rows.begin + i));
    bias[i] = raw ? 0.0f : w.queries.bias[rows.begin + i];
  }
  const Batch batch{tiles.tiles,
                    tiles.count,
                    spans,
                    is_turned(run, tiles.tiles[0]) ? nullptr : bias,
                    rows.count,
                    p.cache.head_dim,
                    w.scores,
                    w.weights,
                    state_row(state, rows.begin, p.cache.head_dim)};
  if (is_single) feed.begin(p.out == nullptr ? tiles.count : 2 * tiles.count);
  const auto lines = [&](const Tile& tile, int bits) {
    return is_single ? lines_for(feed, tile, bits, batch.head_dim) : no_lines(tile.positions);
  };
  for (int t = 0; t < tiles.count; ++t) {
    const Lines fetch = lines(tiles.tiles[t], tiles.tiles[t].k_bits);
    if (is_single) load_k(run, tiles.tiles[t], w, fetch);
    // Of several blocks some may see nothing of their only tile.
    if (!multiply_queries(run, tiles.head, tiles.tiles[t], w, rows, fetch, batch.scores_at(t, 0)))
      return;
  }
  const int digits = digits_of(run, tiles.tiles[0]);
  digits == 2   ? softmax_batch<2>(batch)
  : digits == 1 ? softmax_batch<1>(batch)
                : softmax_batch<0>(batch);
  if (p.out == nullptr) return;
  for (int t = 0; t < tiles.count; ++t) {
    const Lines fetch = lines(tiles.tiles[t], tiles.tiles[t].v_bits);
    if (is_single) load_v(run, tiles.tiles[t], w, fetch);
    multiply_weights(run, tiles.tiles[t], w, batch, t, fetch);
  }
}

inline void rotate_back(const DecodeAttentionParams& p, State state) {
  if (p.out == nullptr) return;
  for (int64_t r = 0; r < num_rows(p); ++r) {
    rotate(state.o + r * p.cache.head_dim, p.cache.head_dim, true);
  }
}

inline void attend_piece(const AttentionRun& run, const Piece& piece, const Workspace& w,
                         State state, Feed& feed) {
  const DecodeAttentionParams& p = run.p;
  const int64_t rows = run.rows;
  prepare_queries(p, piece.head, run.rotated, w.queries);
  clear_state(state, rows, p.cache.head_dim, w.queries);
  bool in_rotated_space = run.rotated;
  TileBatch tiles;
  tiles.head = piece.head;
  const auto attend = [&] {
    if (tiles.count == 0) return;
    if (w.v_tile != w.k_tile) {  // several blocks share one decoded tile
      const Tile& tile = tiles.tiles[0];
      feed.begin(p.out == nullptr ? 1 : 2);
      const auto lines = [&](int bits) { return lines_for(feed, tile, bits, p.cache.head_dim); };
      load_k(run, tile, w, lines(tile.k_bits));
      if (p.out != nullptr) load_v(run, tile, w, lines(tile.v_bits));
    }
    for_row_blocks(rows, [&](RowBlock block) { attend_block(run, tiles, w, state, block, feed); });
    tiles.count = 0;
  };
  const int full = batch_tiles(p);
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    Tile& tile = tiles.tiles[tiles.count];
    open_tile(p, piece.head, i, tile);
    tile.shares = shares_of(run, piece.head, i);
    if (tile.visible == 0) {
      feed.pass(tile.ref.tier);
      if (tile.shares.tops != nullptr) tile.shares.tops[0] = NO_SHARES;
      continue;
    }
    feed.open(tile.ref.tier);
    const Tile& first = tiles.tiles[0];
    const bool raw = tile.is_raw();
    if (raw != first.is_raw() || digits_of(run, tile) != digits_of(run, first)) {
      const int slot = tiles.count;
      attend();
      tiles.tiles[0] = tiles.tiles[slot];
    }
    if (in_rotated_space && raw) {
      rotate_back(p, state);
      in_rotated_space = false;
    }
    if (++tiles.count == full) attend();
  }
  attend();
  if (in_rotated_space) rotate_back(p, state);
}

inline void finish_head(const AttentionRun& run, int64_t head, State state) {
  for (int64_t r = 0; r < run.rows; ++r) {
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
    for (int64_t r = 0; r < run.rows; ++r) {
      const State a = state_row(into, r, head_dim), b = state_row(from, r, head_dim);
      if (*b.sum == 0) continue;  // but not NaN
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

inline void attend_part(const AttentionRun& run, int64_t part) {
  const int64_t parts = run.plan.parts;
  const Workspace w = workspace_of(run, part);
  Feed feed = feed_of(run, part, batch_tiles(run.p));
  for (int64_t i = run.plan.part_begin[part]; i < run.plan.part_begin[part + 1]; ++i) {
    const Piece& piece = run.plan.pieces[i];
    const State state = state_of(run, piece.state);
    attend_piece(run, piece, w, state, feed);
    if (piece.state < parts) finish_head(run, piece.head, state);
  }
}

// With has_lse the first walk is skipped: p.lse already holds the result.
inline void run_attention(const DecodeAttentionParams& p, const Parallel& parallel, bool has_lse) {
  const int64_t parts = parallel.num_threads;
  const AttentionPlan plan(p, parts);
  const TierCodecs codecs(p.cache);
  const Scratch memory(parts * workspace_bytes(p) +
                       plan.num_states * state_floats(p) * sizeof(float));
  const int64_t max_tiles = keeps_shares(p) ? plan.max_tiles : 0;
  const Scratch shares(p.cache.batch * p.cache.num_kv_heads * max_tiles * share_bytes(p));
  const AttentionRun run{p,
                         plan,
                         codecs,
                         memory.data(),
                         num_rows(p),
                         num_groups(p),
                         has_quantised_tier(p.cache),
                         max_tiles,
                         max_tiles > 0 ? shares.data() : nullptr};
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
      Feed feed = feed_of(run, part, 1);
      for (int64_t i = run.plan.part_begin[part]; i < run.plan.part_begin[part + 1]; ++i) {
        const Piece& piece = run.plan.pieces[i];
        run.shares == nullptr ? add_mass_piece(run, piece, w, feed) : add_shares_piece(run, piece);
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

// Attention mass: the probabilities that each key received, summed over the rows of its head. Needs
// the final log-sum-exp, so it is a second walk: over the exponentials that the first one kept, or
// over the keys again.
#pragma once

namespace smartkv::SMARTKV_ISA {

inline void add_mass_block(const AttentionRun& run, int64_t head, const Tile& tile,
                           const Workspace& w, RowBlock block, Lines fetch, float* mass) {
  const DecodeAttentionParams& p = run.p;
  if (!multiply_queries(run, head, tile, w, block, fetch, w.scores)) return;
  for (int i = 0; i < block.count; ++i) {
    const int64_t row = block.begin + i;
    const float lse = p.lse[output_row(p, head, row)];
    if (!(lse > -INFINITY)) continue;
    const float plain_bias = tile.is_raw() ? 0.0f : w.queries.bias[row];
    const float* bias = is_turned(run, tile) ? nullptr : &plain_bias;
    const Span span = span_of_query(p, query_of_row(run, row));
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

inline void add_mass_piece(const AttentionRun& run, const Piece& piece, const Workspace& w,
                           Feed& feed) {
  const DecodeAttentionParams& p = run.p;
  prepare_queries(p, piece.head, run.rotated, w.queries);
  Tile tile;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    open_tile(p, piece.head, i, tile);
    float* out = mass_of(p, piece.head, tile.ref);
    if (tile.visible == 0 || out == nullptr) {
      feed.pass(tile.ref.tier);
      continue;
    }
    feed.open(tile.ref.tier);
    alignas(64) float mass[PAGE_SIZE] = {};
    feed.begin(1);
    Lines fetch = lines_for(feed, tile, tile.k_bits, p.cache.head_dim);
    load_k(run, tile, w, fetch);
    for_row_blocks(run.rows, [&](RowBlock block) {
      add_mass_block(run, piece.head, tile, w, block, fetch, mass);
      fetch = no_lines(tile.positions);
    });
    __builtin_memcpy(out, mass, tile.ref.count * sizeof(float));
  }
}

// The same from the exponentials that the first walk kept.
inline void add_shares_piece(const AttentionRun& run, const Piece& piece) {
  const DecodeAttentionParams& p = run.p;
  const int rows = static_cast<int>(run.rows);
  float lse[SHARED_ROWS];
  for (int r = 0; r < rows; ++r) lse[r] = p.lse[output_row(p, piece.head, r)];
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const Shares shares = shares_of(run, piece.head, i);
    const TileRef ref = tile_at(p, piece.head, i);
    float* out = mass_of(p, piece.head, ref);
    if (out == nullptr || shares.tops[0] == NO_SHARES) continue;
    alignas(64) float mass[PAGE_SIZE];
    add_shares(shares, rows, lse, mass);
    __builtin_memcpy(out, mass, ref.count * sizeof(float));
  }
}

}  // namespace smartkv::SMARTKV_ISA

// Both products of a tile, Q K and P V, in the arithmetic that its tier and the precision ask for.
#pragma once

namespace smartkv::SMARTKV_ISA {

// How the products of a tile are formed. Integers cannot hold a NaN.
SMARTKV_INLINE int digits_of(const AttentionRun& run, const Tile& tile) {
  return tile.has_nan ? 0 : num_digits(run.p.precision, tile.k_bits);
}
SMARTKV_INLINE bool is_integer(const AttentionRun& run, const Tile& tile) {
  return digits_of(run, tile) > 0;
}
// Few rows multiply plain rows where they lie,
SMARTKV_INLINE bool is_dense(const AttentionRun& run, const Tile& tile) {
  return tile.is_raw() && run.rows <= DENSE_ROWS;
}
// and packed codes directly.
SMARTKV_INLINE bool is_k_fused(const AttentionRun& run, const Tile& tile) {
  return !tile.is_raw() && run.rows <= FUSED_ROWS;
}
SMARTKV_INLINE bool is_v_fused(const AttentionRun& run, const Tile& tile) {
  return is_k_fused(run, tile) && run.codecs.v[tile.ref.tier].has_aligned_v;
}

// Codes of K or V, and the lines to fetch meanwhile.
SMARTKV_INLINE CodeStream k_stream(const Tile& tile, Lines fetch) { return {tile.page, fetch}; }
SMARTKV_INLINE CodeStream v_stream(const Tile& tile, Lines fetch) { return {tile.v_codes, fetch}; }
// The section of an 8-bit page, unpacked before, while the lines were fetched.
SMARTKV_INLINE CodeStream unpacked_stream(const float* tile) {
  const auto* codes = reinterpret_cast<const uint8_t*>(tile);
  return {codes, no_lines(codes)};
}

// The lines that a product with K (V) of a tile fetches.
SMARTKV_INLINE Lines lines_for(Feed& feed, const Tile& tile, int bits, int head_dim) {
  const int steps = tile.is_raw() ? row_steps(tile.k, head_dim) : record_lanes(bits, head_dim);
  return feed.take(steps, tile.positions);
}

// Whether integer products read the codes as an 8-bit section unpacked before.
SMARTKV_INLINE bool is_unpacked(const AttentionRun& run, int bits, int lanes_per_load) {
  const int head_dim = run.p.cache.head_dim;
  return run.rows > UNPACKED_ROWS ||
         (!is_regular(bits, head_dim, lanes_per_load) && !is_half(bits, head_dim, lanes_per_load));
}

// What the products of K (V) need beside the page.
inline void load_k(const AttentionRun& run, const Tile& tile, const Workspace& w, Lines fetch) {
  if (is_integer(run, tile)) {
    if (!is_unpacked(run, tile.k_bits, K_LANES)) return;
    unpack_codes<K_LANES>(run.codecs.k[tile.ref.tier], k_stream(tile, fetch),
                          reinterpret_cast<uint8_t*>(w.k_tile));
  } else if (!is_k_fused(run, tile) && !is_dense(run, tile)) {
    decode_tile_k(tile, run.codecs, fetch, run.p.cache.head_dim, w.k_tile);
  }
}
inline void load_v(const AttentionRun& run, const Tile& tile, const Workspace& w, Lines fetch) {
  if (is_integer(run, tile)) {
    if (!is_unpacked(run, tile.v_bits, V_LANES)) return;
    unpack_codes<V_LANES>(run.codecs.v[tile.ref.tier], v_stream(tile, fetch),
                          reinterpret_cast<uint8_t*>(w.v_tile));
  } else if (!is_v_fused(run, tile) && !is_dense(run, tile)) {
    decode_tile_v(tile, run.codecs, fetch, run.p.cache.head_dim, w.v_tile);
  }
}

inline void multiply_integer(const AttentionRun& run, const Tile& tile, const Workspace& w,
                             RowBlock block, Lines fetch, float* scores) {
  const bool is_wide = is_unpacked(run, tile.k_bits, K_LANES);
  const SectionCodec& codec = run.codecs.k[tile.ref.tier];
  const int digits = digits_of(run, tile);
  const int64_t num = run.rows, head_dim = codec.head_dim;
  const QueryDigits& q = w.queries.ints;
  const DigitRows rows{reinterpret_cast<const char*>(q.digits),
                       num * head_dim,
                       head_dim,
                       q.scale[digits - 1],
                       q.start,
                       num};
  dot_k_rows(codec, is_wide ? 8 : tile.k_bits,
             is_wide ? unpacked_stream(w.k_tile) : k_stream(tile, fetch), digits,
             rows.from_row(block.begin), block.count, scores);
}

inline void multiply_k_block(const AttentionRun& run, const Tile& tile, const Workspace& w,
                             RowBlock block, Lines fetch, float* scores) {
  const int head_dim = run.p.cache.head_dim;
  if (is_integer(run, tile)) return multiply_integer(run, tile, w, block, fetch, scores);
  if (is_k_fused(run, tile)) {
    return multiply_k_rows(run.codecs.k[tile.ref.tier], k_stream(tile, fetch), block.count,
                           w.queries.rotated, scores);
  }
  const float* q = tile.is_raw() ? w.queries.plain : w.queries.rotated;
  if (is_dense(run, tile)) {
    return dense_k_rows(tile.k, fetch, head_dim, block.count, q + block.begin * head_dim, scores);
  }
  gemm<false>(
      {q + block.begin * head_dim, head_dim, w.k_tile, PAGE_SIZE, scores, PAGE_SIZE, head_dim},
      block.count, PAGE_SIZE);
}

// Products of the queries of a block with a tile, scores where a mean turns; false when none of
// them can see it.
inline bool multiply_queries(const AttentionRun& run, int64_t head, const Tile& tile,
                             const Workspace& w, RowBlock block, Lines fetch, float* scores) {
  const int64_t last = query_of_row(run, block.begin + block.count - 1);
  if (span_of_query(run.p, last).high < tile.first_position) return false;
  multiply_k_block(run, tile, w, block, fetch, scores);
  if (is_turned(run, tile)) finish_turned(run, head, tile, w, block, scores);
  return true;
}

// O += P V of a block for tile t of the batch.
inline void multiply_weights(const AttentionRun& run, const Tile& tile, const Workspace& w,
                             const Batch& batch, int t, Lines fetch) {
  const int head_dim = batch.head_dim;
  float* o = batch.rows.o;
  if (is_integer(run, tile)) {
    const bool is_wide = is_unpacked(run, tile.v_bits, V_LANES);
    const DigitRows weights{reinterpret_cast<const char*>(batch.digits_at(t, 0)),
                            PROBABILITY_PLANE,
                            PAGE_SIZE,
                            batch.weights.scale + t * ROW_BLOCK,
                            nullptr,
                            0};
    dot_v_rows(run.codecs.v[tile.ref.tier], is_wide ? 8 : tile.v_bits,
               is_wide ? unpacked_stream(w.v_tile) : v_stream(tile, fetch), digits_of(run, tile),
               weights, batch.count, o);
  } else if (is_dense(run, tile)) {
    dense_v_rows(tile.v, fetch, tile.visible, head_dim, batch.count, batch.scores_at(t, 0), o);
  } else if (is_v_fused(run, tile)) {
    multiply_v_rows(run.codecs.v[tile.ref.tier], v_stream(tile, fetch), batch.count,
                    batch.scores_at(t, 0), o);
  } else {
    gemm<true>(
        {batch.scores_at(t, 0), PAGE_SIZE, w.v_tile, v_stride(head_dim), o, head_dim, PAGE_SIZE},
        batch.count, head_dim);
  }
}

}  // namespace smartkv::SMARTKV_ISA

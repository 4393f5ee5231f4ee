// One tile of keys as attention sees it: positions, visibility, scales, decoded K and V.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Exponentials of a tile, kept until the sums are known; null pointers where nobody asked.
struct Shares {
  float* tops;  // [rows], what they are relative to; NO_SHARES first where the tile was not seen
  uint16_t* exponentials;  // [rows, 64] float16
};
constexpr float NO_SHARES = INFINITY;

struct Tile {
  alignas(64) int32_t positions[PAGE_SIZE];  // -1 in slots that hold no token
  alignas(64) float k_scale[PAGE_SIZE];      // 1 in raw tiles
  alignas(64) float v_scale[PAGE_SIZE];
  float v_top;     // largest V scale of a token
  bool is_uneven;  // it is more than twice the mean: a bound by it would waste digits
  bool has_nan;    // some V scale of a token is NaN
  TileRef ref;
  int k_bits, v_bits;
  const uint8_t* page;     // of a paged tile
  const uint8_t* v_codes;  // in it
  Rows k, v;               // of a raw tile
  uint64_t visible;        // bit i: some query sees slot i
  bool all_visible;        // every query sees every slot
  int32_t first_position;
  Shares shares;

  SMARTKV_INLINE bool is_raw() const { return k_bits == 16; }
};

// Positions that a query sees: [low, high].
struct Span {
  int32_t low, high;
};

SMARTKV_INLINE int32_t clamp_position(int64_t x) {
  // Headroom of one, so that the comparisons may use low - 1 and high + 1.
  constexpr int64_t TOP = INT32_MAX - 1;
  return static_cast<int32_t>(x < 0 ? -1 : x > TOP ? TOP : x);
}

inline Span span_of_query(const DecodeAttentionParams& p, int64_t query) {
  const int64_t position = *p.q_start + query;
  const int64_t low = p.sliding_window > 0 ? position - p.sliding_window + 1 : 0;
  return {clamp_position(low > 0 ? low : 0), clamp_position(position)};
}

inline void find_visible(const DecodeAttentionParams& p, Tile& tile) {
  int32_t lowest = INT32_MAX, highest = -1;
  for (int i = 0; i < PAGE_SIZE; ++i) {
    const int32_t x = tile.positions[i];
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
  }
  const Span first = span_of_query(p, 0), last = span_of_query(p, p.q_len - 1);
  tile.first_position = 0;
  tile.all_visible = lowest >= last.low && highest <= first.high;
  tile.visible = tile.all_visible ? ~uint64_t{0} : 0;
  if (tile.all_visible || highest < first.low || lowest > last.high) return;
  tile.first_position = INT32_MAX;
  for (int i = 0; i < PAGE_SIZE; ++i) {
    const int32_t x = tile.positions[i];
    if (x < first.low || x > last.high) continue;
    tile.visible |= uint64_t{1} << i;
    tile.first_position = x < tile.first_position ? x : tile.first_position;
  }
}

inline void load_positions(Tile& tile, const void* positions) {
  const int count = tile.ref.count;
  __builtin_memcpy(tile.positions, positions, count * sizeof(int32_t));
  for (int i = count; i < PAGE_SIZE; ++i) tile.positions[i] = -1;
}

inline void set_unit_scales(Tile& tile) {
  for (int i = 0; i < PAGE_SIZE; i += 16) {
    store(tile.k_scale + i, splat(1.0f));
    store(tile.v_scale + i, splat(1.0f));
  }
  tile.v_top = 1;
  tile.is_uneven = false;
  tile.has_nan = false;
}

inline void open_window_tile(const DecodeAttentionParams& p, int64_t head, Tile& tile) {
  const int64_t b = head / p.cache.num_kv_heads, h = head % p.cache.num_kv_heads;
  const int64_t first = tile.ref.index * PAGE_SIZE;
  tile.k_bits = tile.v_bits = 16;
  load_positions(tile, p.window_positions + b * p.window_len + first);
  const HeadsView &k = p.k_window, &v = p.v_window;
  const bool is_last = first + PAGE_SIZE >= p.window_len;
  const auto rows_of = [&](const HeadsView& x) {
    const int64_t stride = x.stride_n * dtype_size(x.dtype);
    return Rows{row_of(x, b, h, first), x.dtype, stride, tile.ref.count,
                is_last ? 0 : PAGE_SIZE * stride};
  };
  tile.k = rows_of(k);
  if (v.data != nullptr) tile.v = rows_of(v);
}

// Everything but the decoded values. Leaves `visible` 0 where no query sees any slot.
inline void open_tile(const DecodeAttentionParams& p, int64_t head, int64_t index, Tile& tile) {
  const PagedKV& cache = p.cache;
  tile.ref = tile_at(p, head, index);
  if (tile.ref.tier == cache.num_tiers) {
    open_window_tile(p, head, tile);
    find_visible(p, tile);
    set_unit_scales(tile);
    return;
  }
  const PageLayout layout =
      page_layout(cache.tier_bits[tile.ref.tier], cache.head_dim, dtype_size(cache.raw_dtype));
  const uint8_t* page = slot_of(cache, head, tile.ref.tier, tile.ref.index * PAGE_SIZE).page;
  tile.k_bits = layout.k_bits;
  tile.v_bits = layout.v_bits;
  tile.page = page;
  tile.v_codes = page + layout.v_codes;
  load_positions(tile, page + layout.position);
  find_visible(p, tile);
  if (layout.is_raw()) {
    const char* rows = reinterpret_cast<const char*>(page);
    const int64_t stride = int64_t{cache.head_dim} * layout.itemsize;
    tile.k = {rows + layout.k_codes, cache.raw_dtype, stride, tile.ref.count, 0};
    tile.v = {rows + layout.v_codes, cache.raw_dtype, stride, tile.ref.count, 0};
    set_unit_scales(tile);
    return;
  }
  F top = splat(0.0f), sum = splat(0.0f);
  for (int i = 0; i < PAGE_SIZE; i += 16) {
    const auto scales = [&](int64_t section) {
      return load_fp16(reinterpret_cast<const uint16_t*>(page + section) + i);
    };
    const F v_scale = scales(layout.v_scale);
    store(tile.k_scale + i, scales(layout.k_scale));
    store(tile.v_scale + i, v_scale);
    // Slots that were never written may hold NaN.
    const I is_token = gt(load_words(tile.positions + i), splat(-1));
    const F of_token = select(is_token, v_scale, splat(0.0f));
    top = vmax(top, of_token);
    sum = sum + of_token;
  }
  tile.v_top = hmax(top);
  const float total = hsum(sum);
  tile.is_uneven = tile.v_top * static_cast<float>(tile.ref.count) > 2 * total;
  tile.has_nan = std::isnan(total);
}

inline void decode_tile_k(const Tile& tile, const TierCodecs& codecs, Lines fetch, int head_dim,
                          float* out) {
  if (tile.is_raw()) return load_transposed(out, tile.k, fetch, head_dim);
  fetch.walk(record_lanes(tile.k_bits, head_dim));
  decode_k_tile(out, tile.page, codecs.k[tile.ref.tier]);
}

inline void decode_tile_v(const Tile& tile, const TierCodecs& codecs, Lines fetch, int head_dim,
                          float* out) {
  if (tile.is_raw()) return load_visible(out, tile.v, fetch, head_dim, tile.visible);
  fetch.walk(record_lanes(tile.v_bits, head_dim));
  decode_v_tile(out, tile.v_codes, codecs.v[tile.ref.tier]);
}

}  // namespace smartkv::SMARTKV_ISA

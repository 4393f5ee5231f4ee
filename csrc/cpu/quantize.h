// quantize_kv, dequantize_kv, append_kv.
#pragma once

namespace smartkv::SMARTKV_ISA {

inline void quantize_page(const QuantizeParams& p, const Encoder& encoder, int64_t head,
                          int64_t page) {
  const PageLayout layout = page_layout(p.tier, p.head_dim, dtype_size(p.k.dtype));
  const int64_t b = head / p.num_kv_heads, h = head % p.num_kv_heads;
  const int64_t num_pages = (p.kv_len + PAGE_SIZE - 1) / PAGE_SIZE;
  uint8_t* out = p.pages + (head * num_pages + page) * p.page_bytes;
  const KeyShift shift = shift_of_head(p.k_mean, p.turns, head, p.head_dim);
  if ((page + 1) * PAGE_SIZE > p.kv_len) __builtin_memset(out, 0, p.page_bytes);
  for (int s = 0; s < PAGE_SIZE; ++s) {
    const int64_t n = page * PAGE_SIZE + s;
    if (n >= p.kv_len) {
      put<int32_t>(out + layout.position, s, -1);
      continue;
    }
    const Slot slot{out, s};
    const int64_t token = head * p.kv_len + n;
    write_rows(layout, encoder, slot, p.k.dtype, row_of(p.k, b, h, n), row_of(p.v, b, h, n), shift,
               p.positions[token]);
    write_label(layout, slot, p.positions[token], to_bf16(p.scores[token]));
  }
}

inline void quantize_kv(const QuantizeParams& p, const Parallel& parallel) {
  const Encoder encoder(p.tier, p.levels);
  const int64_t num_pages = (p.kv_len + PAGE_SIZE - 1) / PAGE_SIZE;
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * num_pages;
  parallel_for(parallel, items, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_page(p, encoder, i / num_pages, i % num_pages);
  });
}

inline void dequantize_page(const DequantizeParams& p, const Encoder& encoder, int64_t head,
                            int64_t page) {
  const int head_dim = p.head_dim;
  const PageLayout layout = page_layout(p.tier, head_dim, dtype_size(p.dtype));
  const int64_t index = head * p.num_pages + page, first = index * PAGE_SIZE * head_dim;
  const uint8_t* in = p.pages + index * p.page_bytes;
  if (layout.is_raw()) {
    __builtin_memcpy(at(p.k, p.dtype, first), in + layout.k_codes, layout.v_codes);
    __builtin_memcpy(at(p.v, p.dtype, first), in + layout.v_codes, layout.v_codes);
    return;
  }
  alignas(64) float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
  const KeyShift shift = shift_of_head(p.k_mean, p.turns, head, head_dim);
  for (int s = 0; s < PAGE_SIZE; ++s) {
    read_rotated(layout, encoder, {const_cast<uint8_t*>(in), s}, k, v);
    rotate(k, head_dim, true);
    rotate(v, head_dim, true);
    if (shift.weights != nullptr) divide_row(k, shift.weights, head_dim);
    for (int c = 0; c < head_dim; c += 16) store(k + c, load(k + c) + load(shift.mean + c));
    if (shift.turns > 0) turn_row<1>(k, shift, get<int32_t>(in + layout.position, s), head_dim);
    store_row(at(p.k, p.dtype, first + s * head_dim), p.dtype, k, head_dim);
    store_row(at(p.v, p.dtype, first + s * head_dim), p.dtype, v, head_dim);
  }
}

inline void dequantize_kv(const DequantizeParams& p, const Parallel& parallel) {
  const Encoder encoder(p.tier, p.levels);
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * p.num_pages;
  parallel_for(parallel, items, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dequantize_page(p, encoder, i / p.num_pages, i % p.num_pages);
    }
  });
}

// Encoders and layouts of the tiers of a cache.
struct Tiers {
  PageLayout layout[MAX_TIERS];
  Encoder encoder[MAX_TIERS];

  explicit Tiers(const PagedKV& cache)
      : layout{}, encoder{of(cache, 0), of(cache, 1), of(cache, 2), of(cache, 3),
                          of(cache, 4), of(cache, 5), of(cache, 6)} {
    const int itemsize = dtype_size(cache.raw_dtype);
    for (int t = 0; t < cache.num_tiers; ++t) {
      layout[t] = page_layout(cache.tier_bits[t], cache.head_dim, itemsize);
    }
  }

 private:
  static Encoder of(const PagedKV& cache, int t) {
    return {t < cache.num_tiers ? cache.tier_bits[t] : 16, cache.levels};
  }
};

SMARTKV_INLINE KeyShift shift_of(const PagedKV& cache, int64_t head) {
  return shift_of_head(cache.k_mean, cache.turns, head, cache.head_dim);
}

// Record i of a tier of a head.
inline Slot slot_of(const PagedKV& cache, int64_t head, int tier, int64_t i) {
  const int64_t entry = (head * cache.num_tiers + tier) * cache.max_pages + i / PAGE_SIZE;
  return {cache.pools[tier] + cache.block_table[entry] * cache.page_bytes[tier],
          static_cast<int>(i % PAGE_SIZE)};
}

inline void append_head(const AppendParams& p, const Tiers& tiers, int64_t head) {
  const PagedKV& cache = p.cache;
  const int64_t b = head / cache.num_kv_heads, h = head % cache.num_kv_heads;
  int32_t* lengths = cache.cache_seqlens + head * cache.num_tiers;
  const KeyShift shift = shift_of(cache, head);
  for (int64_t i = 0; i < p.new_len; ++i) {
    const int64_t token = head * p.new_len + i;
    const int t = p.tiers[token];
    if (t < 0) continue;
    const Slot slot = slot_of(cache, head, t, lengths[t]++);
    write_rows(tiers.layout[t], tiers.encoder[t], slot, p.k.dtype, row_of(p.k, b, h, i),
               row_of(p.v, b, h, i), shift, p.positions[token]);
    write_label(tiers.layout[t], slot, p.positions[token], to_bf16(p.scores[token]));
  }
}

inline void append_kv(const AppendParams& p, const Parallel& parallel) {
  const Tiers tiers(p.cache);
  const int64_t heads = int64_t{p.cache.batch} * p.cache.num_kv_heads;
  parallel_for(parallel, heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) append_head(p, tiers, head);
  });
}

}  // namespace smartkv::SMARTKV_ISA

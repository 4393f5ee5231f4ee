// compact_kv: evict and demote records, then close the holes.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Fills the lowest hole of a tier with its highest survivor. Returns the number of survivors.
inline int64_t close_holes(const PagedKV& cache, const Tiers& tiers, int64_t head, int tier,
                           const int8_t* target, int64_t length) {
  int64_t low = 0, high = length - 1;
  while (true) {
    while (low <= high && target[low] == tier) ++low;
    while (low < high && target[high] != tier) --high;
    if (low >= high) return low;
    copy_record(tiers.layout[tier], slot_of(cache, head, tier, low),
                slot_of(cache, head, tier, high));
    ++low;
    --high;
  }
}

// Re-encodes a record for a lower tier; quantised records stay in the rotated space.
inline void demote_record(const PagedKV& cache, const Tiers& tiers, int64_t head, int from_tier,
                          Slot from, int to_tier, Slot to) {
  const PageLayout &source = tiers.layout[from_tier], &target = tiers.layout[to_tier];
  if (source.bits == 16) {
    const int64_t row = int64_t{source.head_dim} * source.itemsize;
    const char* page = reinterpret_cast<const char*>(from.page);
    write_rows(target, tiers.encoder[to_tier], to, cache.raw_dtype,
               page + source.k_codes + from.index * row, page + source.v_codes + from.index * row,
               cache.k_mean + head * cache.head_dim);
  } else {
    alignas(64) float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
    read_rotated(source, tiers.encoder[from_tier], from, k, v);
    write_rotated(target, tiers.encoder[to_tier], to, k, v);
  }
  write_label(target, to, get<int32_t>(from.page + source.position, from.index),
              get<uint16_t>(from.page + source.score, from.index));
}

// Tiers in ascending bits: a demotion reads a tier that is still as it was.
inline void compact_head(const CompactParams& p, const Tiers& tiers, int64_t head) {
  const PagedKV& cache = p.cache;
  const int64_t capacity = cache.max_pages * PAGE_SIZE;
  const int8_t* targets = p.targets + head * cache.num_tiers * capacity;
  int32_t* lengths = cache.cache_seqlens + head * cache.num_tiers;
  for (int t = 0; t < cache.num_tiers; ++t) {
    int64_t n = close_holes(cache, tiers, head, t, targets + t * capacity, lengths[t]);
    for (int s = cache.num_tiers - 1; s > t; --s) {
      for (int64_t i = 0; i < lengths[s]; ++i) {
        if (targets[s * capacity + i] != t) continue;
        demote_record(cache, tiers, head, s, slot_of(cache, head, s, i), t,
                      slot_of(cache, head, t, n++));
      }
    }
    lengths[t] = static_cast<int32_t>(n);
  }
}

inline void compact_kv(const CompactParams& p, const Parallel& parallel) {
  const Tiers tiers(p.cache);
  const int64_t heads = int64_t{p.cache.batch} * p.cache.num_kv_heads;
  parallel_for(parallel, heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) compact_head(p, tiers, head);
  });
}

}  // namespace smartkv::SMARTKV_ISA

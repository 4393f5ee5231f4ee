// compact_kv: evict and demote records, then close the holes.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Bit i: at[i] == value, for 64 bytes.
SMARTKV_INLINE uint64_t equal_mask(const int8_t* at, int8_t value) {
#if defined(SMARTKV_AVX512)
  return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(at), _mm512_set1_epi8(value));
#elif defined(SMARTKV_AVX2)
  const auto half = [&](int i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i));
    return static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_set1_epi8(value))));
  };
  return uint64_t{half(32)} << 32 | half(0);
#else
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t{at[i] == value} << i;
  return mask;
#endif
}

// The first `count` of 64 bits.
SMARTKV_INLINE uint64_t first_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// The records of one tier of one head that have one target, a page at a time.
struct Chosen {
  const int8_t* targets;  // [capacity]
  int8_t target;
  int64_t length;

  SMARTKV_INLINE int64_t num_pages() const { return (length + PAGE_SIZE - 1) / PAGE_SIZE; }
  SMARTKV_INLINE uint64_t page(int64_t i) const {
    return equal_mask(targets + i * PAGE_SIZE, target) & first_bits(length - i * PAGE_SIZE);
  }
  int64_t total() const {
    int64_t n = 0;
    for (int64_t i = 0; i < num_pages(); ++i) n += __builtin_popcountll(page(i));
    return n;
  }
};

// Takes as many bits from both as the smaller one has.
SMARTKV_INLINE Moves pair_up(uint64_t& holes, uint64_t& survivors) {
  Moves moves;
  moves.to = holes;
  for (; holes != 0 && survivors != 0; holes &= holes - 1) {
    const int last = 63 - __builtin_clzll(survivors);
    survivors ^= uint64_t{1} << last;
    moves.from[__builtin_ctzll(holes)] = static_cast<uint8_t>(last);
  }
  moves.to ^= holes;
  return moves;
}

// Fills the holes among the first n slots, n survivors, with the survivors behind them: the lowest
// hole with the highest survivor. Whole pages of bits: a test per slot would be mispredicted.
inline int64_t close_holes(const PagedKV& cache, const Tiers& tiers, int64_t head, int tier,
                           const Chosen& stay) {
  const int64_t n = stay.total();
  int64_t high = stay.num_pages();
  uint64_t survivors = 0;
  uint8_t* from = nullptr;
  Ahead ahead(tiers.layout[tier].page_bytes);
  const auto page_at = [&](int64_t i) { return slot_of(cache, head, tier, i * PAGE_SIZE).page; };
  for (int64_t low = 0; low * PAGE_SIZE < n; ++low) {
    uint64_t holes = ~stay.page(low) & first_bits(n - low * PAGE_SIZE);
    if (holes == 0) continue;
    uint8_t* to = page_at(low);
    if (low + 1 < stay.num_pages()) ahead.add(page_at(low + 1));
    while (holes != 0) {
      while (survivors == 0) {
        --high;
        survivors = stay.page(high) & ~first_bits(n - high * PAGE_SIZE);
        from = page_at(high);
        if (high > 0) ahead.add(page_at(high - 1));
      }
      move_records(tiers.layout[tier], to, from, pair_up(holes, survivors), ahead);
    }
  }
  return n;
}

// Re-encodes a record for a lower tier; quantised records stay in the rotated space.
inline void demote_record(const PagedKV& cache, const Tiers& tiers, int64_t head, int from_tier,
                          Slot from, int to_tier, Slot to) {
  const PageLayout &source = tiers.layout[from_tier], &target = tiers.layout[to_tier];
  const auto position = get<int32_t>(from.page + source.position, from.index);
  if (source.is_raw()) {
    const int64_t row = int64_t{source.head_dim} * source.itemsize;
    const char* page = reinterpret_cast<const char*>(from.page);
    write_rows(target, tiers.encoder[to_tier], to, cache.raw_dtype,
               page + source.k_codes + from.index * row, page + source.v_codes + from.index * row,
               shift_of(cache, head), position);
  } else {
    alignas(64) float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
    read_rotated(source, tiers.encoder[from_tier], from, k, v);
    write_rotated(target, tiers.encoder[to_tier], to, k, v);
    copy_equal_codes(target, to, source, from);
  }
  write_label(target, to, position, get<uint16_t>(from.page + source.score, from.index));
}

// Tiers are ascending: a demotion reads a tier that is still as it was.
inline void compact_head(const CompactParams& p, const Tiers& tiers, int64_t head) {
  const PagedKV& cache = p.cache;
  const int64_t capacity = cache.max_pages * PAGE_SIZE;
  const int8_t* targets = p.targets + head * cache.num_tiers * capacity;
  int32_t* lengths = cache.cache_seqlens + head * cache.num_tiers;
  for (int t = 0; t < cache.num_tiers; ++t) {
    const auto chosen = [&](int from) {
      return Chosen{targets + from * capacity, static_cast<int8_t>(t), lengths[from]};
    };
    int64_t n = close_holes(cache, tiers, head, t, chosen(t));
    for (int s = cache.num_tiers - 1; s > t; --s) {
      const Chosen demoted = chosen(s);
      for (int64_t page = 0; page < demoted.num_pages(); ++page) {
        for (uint64_t bits = demoted.page(page); bits != 0; bits &= bits - 1) {
          const int64_t i = page * PAGE_SIZE + __builtin_ctzll(bits);
          demote_record(cache, tiers, head, s, slot_of(cache, head, s, i), t,
                        slot_of(cache, head, t, n++));
        }
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

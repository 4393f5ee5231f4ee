// Where the codes of a channel lie in a section (K or V) of one width, and how a 32-bit word of
// four codes becomes four vectors of levels.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Byte lane and shift of each group of four channels in a plane.
struct PlaneMap {
  int lanes, width;
  int64_t start;  // byte offset of the plane in its section
  int32_t lane[MAX_HEAD_DIM / 4];
  int32_t shift[MAX_HEAD_DIM / 4];
};

struct SectionCodec {
  int bits, head_dim;
  bool has_aligned_v;  // 16 consecutive channels always share one shift
  Codebook book;
  PlaneMap plane[2];

  void set(int code_bits, Levels levels, int dim) {
    bits = code_bits;
    head_dim = dim;
    has_aligned_v = true;
    book = make_codebook(bits, levels);
    if (bits == 16) return;
    const Planes planes = code_planes(bits);
    int64_t start = 0;
    for (int i = 0; i < planes.count; ++i) {
      PlaneMap& map = plane[i];
      map.width = planes.width[i];
      map.lanes = plane_lanes(dim, map.width);
      map.start = start;
      start += PAGE_SIZE * map.lanes;
      has_aligned_v = has_aligned_v && map.lanes % 16 == 0;
      for (int c = 0; c < dim; c += 4) {
        map.lane[c / 4] = c % map.lanes;
        map.shift[c / 4] = c / map.lanes * map.width;
      }
    }
  }

  // V words of a quad of tokens in channel order, for planes whose lanes are no multiple of 16:
  // a vector that runs past the lanes spills into the channels that the next step overwrites.
  void spread_v_words(const uint8_t* codes, int quad,
                      int32_t (&words)[2][MAX_HEAD_DIM + 32]) const {
    for (int i = 0; i < code_planes(bits).count; ++i) {
      const PlaneMap& map = plane[i];
      const uint8_t* from = codes + map.start + quad * 4 * map.lanes;
      for (int c = 0, shift = 0; c < head_dim; c += map.lanes, shift += map.width) {
        for (int j = 0; j < map.lanes; j += 16) {
          store(words[i] + c + j, load_words(from + 4 * j) >> shift);
        }
      }
    }
  }
};

// Reads words of four codes, one per byte. K: four channels of a token; V: four tokens of a
// channel.
template <int BITS>
struct CodeReader {
  const SectionCodec& codec;
#if defined(SMARTKV_AVX2)
  v8i bytes;  // levels as int8, twice: one vpshufb maps 32 codes
#else
  Lookup lookup;
#endif

#if defined(SMARTKV_AVX2)
  SMARTKV_INLINE explicit CodeReader(const SectionCodec& tier)
      : codec(tier),
        bytes((v8i)_mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(tier.book.level_byte)))) {}
#else
  SMARTKV_INLINE explicit CodeReader(const SectionCodec& tier)
      : codec(tier), lookup(tier.book.level) {}
#endif

  SMARTKV_INLINE I k_part(const PlaneMap& map, const uint8_t* codes, int channel, int block) const {
    const int group = channel / 4;
    const uint8_t* at = codes + map.start + block * 16 * map.lanes + map.lane[group] * 16;
    return BITS == 8 ? load_words(at) : load_words(at) >> map.shift[group];
  }

  SMARTKV_INLINE I v_part(const PlaneMap& map, const uint8_t* codes, int channel, int quad) const {
    const int group = channel / 4;
    const uint8_t* at = codes + map.start + quad * 4 * map.lanes + map.lane[group] * 4;
    return BITS == 8 ? load_words(at) : load_words(at) >> map.shift[group];
  }

  // Channels c..c+3 of tokens 16 * block..+15, with noise above the codes.
  SMARTKV_INLINE I k_codes(const uint8_t* codes, int channel, int block) const {
    const I low = k_part(codec.plane[0], codes, channel, block);
    if constexpr (BITS == 3) return merge(low, k_part(codec.plane[1], codes, channel, block));
    return low;
  }
  SMARTKV_INLINE I k_word(const uint8_t* codes, int channel, int block) const {
    return map(k_codes(codes, channel, block));
  }

  // Channels c..c+15 of tokens 4 * quad..+3; only where the codec has aligned V.
  SMARTKV_INLINE I v_word(const uint8_t* codes, int channel, int quad) const {
    const I low = v_part(codec.plane[0], codes, channel, quad);
    if constexpr (BITS == 3) return map(merge(low, v_part(codec.plane[1], codes, channel, quad)));
    return map(low);
  }

  // Merges the planes; noise above a code is harmless, as tables repeat.
  SMARTKV_INLINE I merge(I word, [[maybe_unused]] I high) const {
    if constexpr (BITS == 3) {
      return (word & splat(0x03030303)) | ((high << 2) & splat(0x04040404));
    }
    return word;
  }

  // Codes to what level<INDEX>() takes.
  SMARTKV_INLINE I map(I word) const {
    if constexpr (BITS == 8) return word ^ splat(static_cast<int32_t>(0x80808080u));
#if defined(SMARTKV_AVX2)
    word = word & splat(0x0f0f0f0f);
    return {shuffle(word.lo), shuffle(word.hi)};
#else
    return word;
#endif
  }

#if defined(SMARTKV_AVX2)
  SMARTKV_INLINE v8i shuffle(v8i codes) const {
    return (v8i)_mm256_shuffle_epi8((__m256i)bytes, (__m256i)codes);
  }
#endif

  // Levels of byte INDEX.
  template <int INDEX>
  SMARTKV_INLINE F level(I word) const {
#if defined(SMARTKV_AVX2)
    constexpr bool SIGNED_BYTES = true;
#else
    constexpr bool SIGNED_BYTES = BITS == 8;
#endif
    if constexpr (SIGNED_BYTES) {
      if constexpr (INDEX == 3) return to_float(word >> 24);
      return to_float((word << (24 - 8 * INDEX)) >> 24);
    } else {
#if !defined(SMARTKV_AVX2)
      if constexpr (INDEX == 0) return lookup(word);
      return lookup(word >> (8 * INDEX));
#endif
    }
  }
};

// Codecs of the tiers of a cache.
struct TierCodecs {
  SectionCodec k[MAX_TIERS], v[MAX_TIERS];

  explicit TierCodecs(const PagedKV& cache) {
    for (int t = 0; t < cache.num_tiers; ++t) {
      k[t].set(k_bits_of(cache.tier_bits[t]), cache.levels, cache.head_dim);
      v[t].set(v_bits_of(cache.tier_bits[t]), cache.levels, cache.head_dim);
    }
  }
};

}  // namespace smartkv::SMARTKV_ISA

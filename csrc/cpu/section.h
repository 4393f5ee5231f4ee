// Codes of a section as bytes: levels four to a word, for integer products.
#pragma once

namespace smartkv::SMARTKV_ISA {

template <int... N>
struct Parts {};
template <int N, int... REST>
struct PartList : PartList<N - 1, N - 1, REST...> {};
template <int... REST>
struct PartList<0, REST...> {
  typedef Parts<REST...> type;
};

// Calls body<0>() ... body<N-1>(), unrolled.
template <class Body, int... N>
SMARTKV_INLINE void each_of(Parts<N...>, const Body& body) {
  (body.template operator()<N>(), ...);
}
template <int N, class Body>
SMARTKV_INLINE void each(const Body& body) {
  each_of(typename PartList<N>::type{}, body);
}

// Four codes of a word to their levels as bytes, with 128 added where BIASED.
template <bool BIASED>
struct LevelBytes {
#if defined(SMARTKV_AVX512)
  __m512i table;
#elif defined(SMARTKV_AVX2)
  __m256i table;
#endif

  SMARTKV_INLINE explicit LevelBytes([[maybe_unused]] const Codebook& book) {
#if defined(SMARTKV_AVX512) || defined(SMARTKV_AVX2)
    __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(book.level_byte));
    if constexpr (BIASED) levels = _mm_xor_si128(levels, _mm_set1_epi8(-128));
#endif
#if defined(SMARTKV_AVX512)
    table = _mm512_broadcast_i32x4(levels);
#elif defined(SMARTKV_AVX2)
    table = _mm256_broadcastsi128_si256(levels);
#endif
  }

  // The table repeats, so bits above the code may hold anything but bit 7 of a byte on AVX2.
  template <int BITS>
  SMARTKV_INLINE I of(I word) const {
    if constexpr (BITS == 8) {
      return BIASED ? word : word ^ splat(static_cast<int32_t>(0x80808080u));
    }
#if defined(SMARTKV_AVX512)
    return (I)_mm512_permutexvar_epi8((__m512i)word, table);
#elif defined(SMARTKV_AVX2)
    return {(v8i)_mm256_shuffle_epi8(table, (__m256i)word.lo),
            (v8i)_mm256_shuffle_epi8(table, (__m256i)word.hi)};
#else
    return word;
#endif
  }
};

// Codes with noise above them as LevelBytes takes them.
SMARTKV_INLINE I as_index(I word) {
#if defined(SMARTKV_AVX2)
  return word & splat(0x0f0f0f0f);
#else
  return word;
#endif
}
// The two lower bits of each byte of one, the third of the other.
SMARTKV_INLINE I merge_planes(I two, I one) {
  const I mask = splat(0x03030303);
#if defined(SMARTKV_AVX2)
  return (two & mask) | (one & splat(0x04040404));
#else
  return (two & mask) | (one & (mask ^ splat(-1)));  // one vpternlog
#endif
}

// What one 64-byte load of a section serves: PARTS vectors of codes, PARTS apart in the channels.
template <int BITS>
struct CodeWords {
  static constexpr int PARTS = 8 / BITS;
  I word;

  template <int PART>
  SMARTKV_INLINE I part() const {
#if defined(SMARTKV_AVX2)
    if constexpr (BITS == 2) {  // one mask serves two parts
      const I both = (word >> (PART % 2 * 2)) & splat(0x33333333);
      return PART < 2 ? both : both >> 4;
    }
#endif
    if constexpr (BITS == 8) return word;
    return as_index(PART == 0 ? word : word >> (PART * BITS));
  }
};

template <>
struct CodeWords<3> {
  static constexpr int PARTS = 8;
  I low[2], high;

  template <int PART>
  SMARTKV_INLINE I part() const {
    const I two = PART / 2 == 0 ? low[PART % 2] : low[PART % 2] >> (PART / 2 * 2);
    const I one = PART < 2 ? high << (2 - PART) : PART == 2 ? high : high >> (PART - 2);
    return merge_planes(two, one);
  }
};

// 3 bits where the high plane of V has lanes for half a vector (head_dim 64): channel j + 8 of a
// part lies one bit above channel j.
constexpr int HALF_3 = -3;

SMARTKV_INLINE I spread_half(const uint8_t* words) {
#if defined(SMARTKV_AVX512)
  const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m512i twice = _mm512_broadcast_i32x8(eight);
  return (I)_mm512_mask_srli_epi32(twice, 0xff00, twice, 1);
#else
  alignas(64) int32_t twice[16];
  __builtin_memcpy(twice, words, 32);
  __builtin_memcpy(twice + 8, words, 32);
  I all = load_words(twice);
  all.hi = all.hi >> 1;
  return all;
#endif
}

template <>
struct CodeWords<HALF_3> {
  static constexpr int PARTS = 4;
  I low, high;

  template <int PART>
  SMARTKV_INLINE I part() const {
    const I one = PART == 0 ? high << 2 : high >> (PART == 0 ? 0 : 2 * PART - 2);
    return merge_planes(low >> (2 * PART), one);
  }
};

// Codes of one tile, K or V, in units of 16 tokens (K) or 4 tokens (V); a unit is `groups` loads,
// and load j holds in part u the channels of group j + u * groups: four of K, sixteen of V.
template <int BITS>
struct Section {
  const uint8_t* codes;
  Lines fetch;
  int groups;
  int64_t high;  // offset of the second plane, 3 bits

  SMARTKV_INLINE Section(CodeStream stream, int head_dim, int lanes_per_load)
      : codes(stream.codes),
        fetch(stream.fetch),
        groups(BITS == HALF_3 ? 1 : plane_lanes(head_dim, BITS == 3 ? 1 : BITS) / lanes_per_load),
        high(int64_t{PAGE_SIZE} * plane_lanes(head_dim, 2)) {}

  SMARTKV_INLINE CodeWords<BITS> load(int unit, int j) const {
    if constexpr (BITS == HALF_3) {
      return {load_words(codes + int64_t{unit} * 64),
              spread_half(codes + high + int64_t{unit} * 32)};
    } else if constexpr (BITS == 3) {
      const uint8_t* two = codes + (int64_t{unit} * 2 * groups + j) * 64;
      return {{load_words(two), load_words(two + groups * 64)},
              load_words(codes + high + (int64_t{unit} * groups + j) * 64)};
    } else {
      return {load_words(codes + (int64_t{unit} * groups + j) * 64)};
    }
  }

  // Called once per load: memory likes its lines in order, whatever the order of the loads.
  SMARTKV_INLINE void prefetch() {
    constexpr int LINES = BITS == 3 ? 3 : BITS == HALF_3 ? 2 : 1;
    SMARTKV_UNROLL
    for (int i = 0; i < LINES; ++i) fetch.step();
  }
};

constexpr int K_LANES = 4, V_LANES = 16;

SMARTKV_INLINE bool is_half(int bits, int head_dim, int lanes_per_load) {
  return bits == 3 && lanes_per_load == V_LANES && plane_lanes(head_dim, 1) * 2 == V_LANES;
}

// Whether the parts of every load are whole groups of channels. Else unpack_section comes first.
SMARTKV_INLINE bool is_regular(int bits, int head_dim, int lanes_per_load) {
  const int lanes = plane_lanes(head_dim, bits == 3 ? 1 : bits);
  return lanes * 8 == head_dim * (bits == 3 ? 1 : bits) && lanes % lanes_per_load == 0;
}

// A section of any tier as the section of an 8-bit page that holds the same levels.
template <int BITS, int LANES>
inline void unpack_section(const SectionCodec& codec, CodeStream stream, uint8_t* out) {
  const LevelBytes<true> levels(codec.book);
  const int units = LANES == K_LANES ? 4 : PAGE_SIZE / 4, per_unit = codec.head_dim / LANES;
  const auto put = [&](int unit, int group, I word) {
    store(reinterpret_cast<int32_t*>(out + (unit * per_unit + group) * 64), word);
  };
  const auto unpack = [&]<int KIND>() {
    Section<KIND> section(stream, codec.head_dim, LANES);
    for (int unit = 0; unit < units; ++unit) {
      for (int j = 0; j < section.groups; ++j) {
        const CodeWords<KIND> words = section.load(unit, j);
        section.prefetch();
        each<CodeWords<KIND>::PARTS>([&]<int PART>() {
          put(unit, j + PART * section.groups,
              levels.template of<KIND>(words.template part<PART>()));
        });
      }
    }
  };
  if (is_regular(BITS, codec.head_dim, LANES)) return unpack.template operator()<BITS>();
  if constexpr (BITS == 3 && LANES == V_LANES) {
    if (is_half(BITS, codec.head_dim, LANES)) return unpack.template operator()<HALF_3>();
  }
  const CodeReader<BITS> reader(codec);
  alignas(64) int32_t words[2][MAX_HEAD_DIM + 32];
  for (int unit = 0; unit < units; ++unit) {
    if (LANES == V_LANES) codec.spread_v_words(stream.codes, unit, words);
    for (int group = 0; group < per_unit; ++group) {
      stream.fetch.step();
      const I word = LANES == K_LANES ? reader.k_codes(stream.codes, group * K_LANES, unit)
                                      : reader.merge(load_words(words[0] + group * V_LANES),
                                                     load_words(words[1] + group * V_LANES));
      put(unit, group, levels.template of<BITS>(BITS == 8 ? word : as_index(word)));
    }
  }
}

}  // namespace smartkv::SMARTKV_ISA

// Encoding of one rotated vector: codes and an fp16 scale, as reference/quantizer.py encode().
#pragma once

namespace smartkv::SMARTKV_ISA {

// Codes of one vector; zeros behind head_dim, because a plane's lanes may reach beyond it.
struct Codes {
  alignas(64) uint8_t at[MAX_HEAD_DIM + 64];
};

// 16 bytes as integers.
SMARTKV_INLINE I widen_bytes(v4i bytes) {
#if defined(SMARTKV_AVX512)
  return (I)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(SMARTKV_AVX2)
  return {(v8i)_mm256_cvtepu8_epi32((__m128i)bytes),
          (v8i)_mm256_cvtepu8_epi32(_mm_unpackhi_epi64((__m128i)bytes, (__m128i)bytes))};
#else
  uint8_t narrow[16];
  __builtin_memcpy(narrow, &bytes, sizeof narrow);
  alignas(64) int32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = narrow[i];
  return load_words(wide);
#endif
}
SMARTKV_INLINE I load_bytes(const uint8_t* p) {
  v4i bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return widen_bytes(bytes);
}

// 16 integers in [0, 255] as bytes.
SMARTKV_INLINE void store_codes(uint8_t* out, I codes) {
#if defined(SMARTKV_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(SMARTKV_AVX2)
  const __m256i pairs = _mm256_packus_epi32((__m256i)codes.lo, (__m256i)codes.hi);
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#else
  alignas(64) int32_t wide[16];
  store(wide, codes);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(wide[i]);
#endif
}

// Number of midpoints strictly below x.
#if defined(SMARTKV_AVX512)
// 32 bins narrower than two neighbouring midpoints are apart: a table gives the number below the
// bin and the only midpoint that can lie inside.
struct MidpointCounter {
  __m512 midpoint[2];
  __m512i below[2];
  float bins_per_unit;

  SMARTKV_INLINE MidpointCounter(const Codebook& book, int bits, Levels levels)
      : bins_per_unit(levels == Levels::UNIFORM ? 1.0f : 0.125f) {
    alignas(64) float inside[32];
    alignas(64) int32_t count[32];
    const int midpoints = bits <= 4 ? (1 << bits) - 1 : 0;
    for (int bin = 0, n = 0; bin < 32; ++bin) {
      const float end = static_cast<float>(bin - 15) / bins_per_unit;
      count[bin] = n;
      inside[bin] = n < midpoints ? book.midpoint[n] : INFINITY;
      if (n < midpoints && book.midpoint[n] < end) ++n;
    }
    for (int i = 0; i < 2; ++i) {
      midpoint[i] = _mm512_load_ps(inside + 16 * i);
      below[i] = _mm512_load_si512(count + 16 * i);
    }
  }

  template <int BITS>
  SMARTKV_INLINE I count(F x) const {
    const F bin = vmin(vmax(fma(x, splat(bins_per_unit), splat(16.0f)), splat(0.0f)), splat(31.0f));
    const __m512i index = _mm512_cvttps_epi32((__m512)bin);
    const __m512 inside = _mm512_permutex2var_ps(midpoint[0], index, midpoint[1]);
    const __m512i base = _mm512_permutex2var_epi32(below[0], index, below[1]);
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, inside, _CMP_GT_OQ);
    return (I)_mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
  }
};
#else
struct MidpointCounter {
  Lookup midpoint;

  SMARTKV_INLINE MidpointCounter(const Codebook& book, int, Levels) : midpoint(book.midpoint) {}

  template <int BITS>
  SMARTKV_INLINE I count(F x) const {
    I code = splat(0);
    SMARTKV_UNROLL
    for (int bit = BITS - 1; bit >= 0; --bit) {
      const int step = 1 << bit;
      const I above = gt(x, midpoint(code + splat(step - 1)));
      code = code + (above & splat(step));
    }
    return code;
  }
};
#endif

// Levels of a width, and what finds the nearest.
struct Quantizer {
  Codebook book;
  MidpointCounter midpoints;

  Quantizer(int bits, Levels levels)
      : book(make_codebook(bits, levels)), midpoints(book, bits, levels) {}
  Quantizer(const Quantizer&) = delete;  // the counter of the portable set points into the book
};

struct Encoder {
  Levels levels;
  Quantizer k, v;

  Encoder(int tier, Levels levels)
      : levels(levels), k(k_bits_of(tier), levels), v(v_bits_of(tier), levels) {}
};

SMARTKV_INLINE F vabs(F x) { return as_float(as_int(x) & splat(INT32_MAX)); }

// K and V of a token are encoded side by side: alone, each would wait for its own sums and
// divisions.
struct Token {
  const float* at[2];  // K, V
};
struct TokenCodes {
  Codes at[2];
  float scale[2];  // unrounded
};

// body<which>(i) for every 16 channels of both.
template <class Body>
SMARTKV_INLINE void for_token(int head_dim, const Body& body) {
  for (int i = 0; i < head_dim; i += 16) {
    body.template operator()<0>(i);
    body.template operator()<1>(i);
  }
}

SMARTKV_INLINE float max_magnitude(const float* y, int count) {
  F top = splat(0.0f);
  for (int i = 0; i < count; i += 16) top = vmax(top, vabs(load(y + i)));
  return hmax(top);
}

SMARTKV_INLINE float sum_of_squares(const float* y, int count) {
  F sum = splat(0.0f);
  for (int i = 0; i < count; i += 16) {
    F square = load(y + i) * load(y + i);
    keep(square);
    sum = sum + square;
  }
  return hsum(sum);
}

// Scale of a vector for its levels, from the sums of vector^2, vector * level and level^2. Least
// squares would shorten it: keys keep their norm, values their product with themselves.
SMARTKV_INLINE float fitted_scale(bool is_v, float power, float product, float square) {
  if (!is_v) return __builtin_sqrtf(power / square);
  return product == 0 ? 0.0f : power / product;  // NaN stays
}

// 2, 3 or 4 bits: nearest levels, then the scale that fits them.
template <int K_BITS, int V_BITS, int HEAD_DIM>
SMARTKV_INLINE void encode_low(const Encoder& encoder, const Token& y, TokenCodes& out) {
  constexpr int BITS[] = {K_BITS, V_BITS};
  // Of one width both use the same tables, which then stay in registers.
  const Quantizer* const quantizers[] = {&encoder.k, K_BITS == V_BITS ? &encoder.k : &encoder.v};
  const bool gaussian = encoder.levels == Levels::GAUSSIAN;
  F inverse[2];
  float power[2];
  for (int r = 0; r < 2; ++r) {
    power[r] = gaussian ? sum_of_squares(y.at[r], HEAD_DIM) : 0.0f;
    const float scale =
        gaussian ? __builtin_sqrtf(power[r] / static_cast<float>(HEAD_DIM)) * gaussian_unit(BITS[r])
                 : max_magnitude(y.at[r], HEAD_DIM) / ((1 << BITS[r]) - 1);
    out.scale[r] = scale;
    inverse[r] = splat(scale > 0 ? 1 / scale : 0.0f);
  }
  const Lookup levels[] = {Lookup(quantizers[0]->book.level), Lookup(quantizers[1]->book.level)};
  F product[2] = {splat(0.0f), splat(0.0f)}, square[2] = {splat(0.0f), splat(0.0f)};
  for_token(HEAD_DIM, [&]<int r>(int i) {
    const F v = load(y.at[r] + i);
    F x = v * inverse[r];
    keep(x);
    const I code = quantizers[r]->midpoints.template count<BITS[r]>(x);
    store_codes(out.at[r].at + i, code);
    const F chosen = levels[r](code);
    F term = v * chosen;
    keep(term);
    product[r] = product[r] + term;
    square[r] = square[r] + chosen * chosen;  // integers below 2^24: exact
  });
  if (!gaussian) return;
  for (int r = 0; r < 2; ++r) {
    out.scale[r] = fitted_scale(r == 1, power[r], hsum(product[r]), hsum(square[r]));
  }
}

template <int HEAD_DIM>
SMARTKV_INLINE void encode_8(const Token& y, TokenCodes& out) {
  F inverse[2];
  for (int r = 0; r < 2; ++r) {
    const float scale = max_magnitude(y.at[r], HEAD_DIM) / 127;
    out.scale[r] = scale;
    inverse[r] = splat(scale > 0 ? 1 / scale : 0.0f);
  }
  for_token(HEAD_DIM, [&]<int r>(int i) {
    F x = load(y.at[r] + i) * inverse[r];
    keep(x);
    x = vmin(vmax(x, splat(-127.0f)), splat(127.0f));
    store_codes(out.at[r].at + i, round_int(x) + splat(128));
  });
}

template <int K_BITS, int V_BITS, int HEAD_DIM>
SMARTKV_INLINE void encode(const Encoder& encoder, const Token& y, TokenCodes& out) {
  if constexpr (K_BITS == 8) {
    encode_8<HEAD_DIM>(y, out);
  } else {
    encode_low<K_BITS, V_BITS, HEAD_DIM>(encoder, y, out);
  }
  for (Codes& codes : out.at) {
    __builtin_memset(codes.at + HEAD_DIM, 0, sizeof codes.at - MAX_HEAD_DIM);
  }
}

// A scale as it is stored.
inline uint16_t stored_scale(float scale) { return to_fp16(scale > 65504.0f ? 65504.0f : scale); }

// Rotated vector of the codes.
template <int BITS, int HEAD_DIM>
SMARTKV_INLINE void decode(const Quantizer& quantizer, const Codes& codes, uint16_t scale,
                           float* y) {
  const F s = splat(from_fp16(scale));
  const Lookup level(quantizer.book.level);
  for (int c = 0; c < HEAD_DIM; c += 16) {
    const I code = load_bytes(codes.at + c);
    const F x = BITS == 8 ? to_float(code - splat(128)) : level(code);
    store(y + c, x * s);
  }
}

}  // namespace smartkv::SMARTKV_ISA

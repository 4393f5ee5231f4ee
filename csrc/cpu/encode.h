// Encoding of one rotated vector: codes and an fp16 scale, as reference/quantizer.py encode().
#pragma once

namespace smartkv::SMARTKV_ISA {

// Codes of one vector; zeros behind head_dim, because a plane's lanes may reach beyond it.
struct Codes {
  alignas(64) uint8_t at[MAX_HEAD_DIM + 64];
};

struct Encoder {
  int bits;
  Levels levels;
  int head_dim;
  Codebook book;

  Encoder(int bits, Levels levels, int head_dim)
      : bits(bits), levels(levels), head_dim(head_dim), book(make_codebook(bits, levels)) {}
};

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

// Number of midpoints strictly below x, by bisection.
template <int BITS>
SMARTKV_INLINE I count_midpoints(F x, const Lookup& midpoint) {
  I code = splat(0);
  SMARTKV_UNROLL
  for (int bit = BITS - 1; bit >= 0; --bit) {
    const int step = 1 << bit;
    const I above = gt(x, midpoint(code + splat(step - 1)));
    code = code + (above & splat(step));
  }
  return code;
}

SMARTKV_INLINE F vabs(F x) { return as_float(as_int(x) & splat(INT32_MAX)); }

inline float max_magnitude(const float* y, int count) {
  F top = splat(0.0f);
  for (int i = 0; i < count; i += 16) top = vmax(top, vabs(load(y + i)));
  return hmax(top);
}

inline float root_mean_square(const float* y, int count) {
  F sum = splat(0.0f);
  for (int i = 0; i < count; i += 16) {
    F square = load(y + i) * load(y + i);
    keep(square);
    sum = sum + square;
  }
  return __builtin_sqrtf(hsum(sum) / static_cast<float>(count));
}

// 2, 3 or 4 bits: nearest levels, then the least-squares scale. Returns the unrounded scale.
template <int BITS>
inline float encode_low(const Encoder& encoder, const float* y, uint8_t* codes) {
  const int count = encoder.head_dim;
  const bool gaussian = encoder.levels == Levels::GAUSSIAN;
  const float scale = gaussian ? root_mean_square(y, count) * gaussian_unit(BITS)
                               : max_magnitude(y, count) / ((1 << BITS) - 1);
  const F inverse = splat(scale > 0 ? 1 / scale : 0.0f);
  const Lookup midpoint(encoder.book.midpoint), level(encoder.book.level);
  F product = splat(0.0f), square = splat(0.0f);
  for (int i = 0; i < count; i += 16) {
    const F v = load(y + i);
    F x = v * inverse;
    keep(x);
    const I code = count_midpoints<BITS>(x, midpoint);
    store_codes(codes + i, code);
    const F chosen = level(code);
    F term = v * chosen;
    keep(term);
    product = product + term;
    square = square + chosen * chosen;  // integers below 2^24: exact
  }
  return gaussian ? hsum(product) / hsum(square) : scale;
}

inline float encode_8(const Encoder& encoder, const float* y, uint8_t* codes) {
  const float scale = max_magnitude(y, encoder.head_dim) / 127;
  const F inverse = splat(scale > 0 ? 1 / scale : 0.0f);
  for (int i = 0; i < encoder.head_dim; i += 16) {
    F x = load(y + i) * inverse;
    keep(x);
    x = vmin(vmax(x, splat(-127.0f)), splat(127.0f));
    store_codes(codes + i, round_int(x) + splat(128));
  }
  return scale;
}

// Returns the scale as the bits of a float16.
inline uint16_t encode(const Encoder& encoder, const float* y, Codes& codes) {
  float scale;
  switch (encoder.bits) {
    case 2:
      scale = encode_low<2>(encoder, y, codes.at);
      break;
    case 3:
      scale = encode_low<3>(encoder, y, codes.at);
      break;
    case 4:
      scale = encode_low<4>(encoder, y, codes.at);
      break;
    default:
      scale = encode_8(encoder, y, codes.at);
  }
  __builtin_memset(codes.at + encoder.head_dim, 0, sizeof codes.at - encoder.head_dim);
  return to_fp16(scale > 65504.0f ? 65504.0f : scale);
}

// Rotated vector of the codes.
inline void decode(const Encoder& encoder, const Codes& codes, uint16_t scale, float* y) {
  const float s = from_fp16(scale);
  const bool wide = encoder.bits == 8;
  for (int c = 0; c < encoder.head_dim; ++c) {
    const int code = codes.at[c];
    y[c] = (wide ? static_cast<float>(code - 128) : encoder.book.level[code]) * s;
  }
}

}  // namespace smartkv::SMARTKV_ISA

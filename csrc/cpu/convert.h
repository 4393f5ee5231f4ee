// Rows of fp32, bf16 and fp16 values to and from fp32.
#pragma once

namespace smartkv::SMARTKV_ISA {

SMARTKV_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
SMARTKV_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

SMARTKV_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
SMARTKV_INLINE float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Round to nearest even, as the hardware conversion does.
inline uint16_t to_fp16(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the half's bits, rounded, at the bottom of the float.
    const uint32_t half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | half);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

inline float from_fp16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

#if defined(SMARTKV_AVX512)
SMARTKV_INLINE F load_fp16(const uint16_t* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SMARTKV_INLINE void store_fp16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
SMARTKV_INLINE F load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
#elif defined(SMARTKV_AVX2)
SMARTKV_INLINE F load_fp16(const uint16_t* p) {
  return {(v8f)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          (v8f)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SMARTKV_INLINE void store_fp16(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph((__m256)x.hi, _MM_FROUND_TO_NEAREST_INT));
}
SMARTKV_INLINE F load_bf16(const uint16_t* p) {
  const __m128i lo = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i hi = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  return {(v8f)_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16),
          (v8f)_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16)};
}
#else
SMARTKV_INLINE F load_fp16(const uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = from_fp16(p[i]);
  return load(x);
}
SMARTKV_INLINE void store_fp16(uint16_t* p, F v) {
  float x[16];
  store(x, v);
  for (int i = 0; i < 16; ++i) p[i] = to_fp16(x[i]);
}
SMARTKV_INLINE F load_bf16(const uint16_t* p) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = from_bf16(p[i]);
  return load(x);
}
#endif

// 16 integers in [0, 65535].
SMARTKV_INLINE void store_halves(uint16_t* p, I x) {
#if defined(SMARTKV_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(SMARTKV_AVX2)
  const __m256i pairs = _mm256_packus_epi32((__m256i)x.lo, (__m256i)x.hi);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xd8));
#else
  int32_t wide[16];
  store(wide, x);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(wide[i]);
#endif
}

SMARTKV_INLINE void store_bf16(uint16_t* p, F v) {
  const I u = as_int(v), is_nan = gt(u & splat(INT32_MAX), splat(0x7f800000));
  const I rounded = ((u + splat(0x7fff) + ((u >> 16) & splat(1))) >> 16) & splat(0xffff);
  store_halves(p, (rounded & (is_nan ^ splat(-1))) | (splat(0x7fc0) & is_nan));
}

SMARTKV_INLINE const char* at(const void* data, DType dtype, int64_t element) {
  return static_cast<const char*>(data) + element * dtype_size(dtype);
}
SMARTKV_INLINE char* at(void* data, DType dtype, int64_t element) {
  return static_cast<char*>(data) + element * dtype_size(dtype);
}
SMARTKV_INLINE const char* row_of(const HeadsView& x, int64_t b, int64_t h, int64_t n) {
  return at(x.data, x.dtype, b * x.stride_b + h * x.stride_h + n * x.stride_n);
}

template <DType DTYPE>
SMARTKV_INLINE F load_values(const void* p, int i) {
  if constexpr (DTYPE == DType::FLOAT32) {
    return load(static_cast<const float*>(p) + i);
  } else if constexpr (DTYPE == DType::BFLOAT16) {
    return load_bf16(static_cast<const uint16_t*>(p) + i);
  } else {
    return load_fp16(static_cast<const uint16_t*>(p) + i);
  }
}

// Calls body with the dtype as a compile-time constant.
template <class Body>
SMARTKV_INLINE void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::FLOAT32) {
    body.template operator()<DType::FLOAT32>();
  } else if (dtype == DType::BFLOAT16) {
    body.template operator()<DType::BFLOAT16>();
  } else {
    body.template operator()<DType::FLOAT16>();
  }
}

// count is a multiple of 16.
inline void load_row(float* out, const void* row, DType dtype, int count) {
  with_dtype(dtype, [&]<DType DTYPE>() {
    for (int i = 0; i < count; i += 16) store(out + i, load_values<DTYPE>(row, i));
  });
}

inline void store_row(void* row, DType dtype, const float* x, int count) {
  for (int i = 0; i < count; i += 16) {
    if (dtype == DType::FLOAT32) {
      store(static_cast<float*>(row) + i, load(x + i));
    } else if (dtype == DType::BFLOAT16) {
      store_bf16(static_cast<uint16_t*>(row) + i, load(x + i));
    } else {
      store_fp16(static_cast<uint16_t*>(row) + i, load(x + i));
    }
  }
}

// Parallel::run with any callable (begin, end); the callable must not throw.
template <class Body>
inline void parallel_for(const Parallel& parallel, int64_t count, const Body& body) {
  if (count <= 0) return;
  parallel.run(count, const_cast<Body*>(&body), [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  });
}

}  // namespace smartkv::SMARTKV_ISA

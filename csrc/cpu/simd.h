// F and I: 16 lanes of float and int32, one native register or a tree of them, so that every
// kernel is written once and sums in the same order in all kernel sets.
//
// Included three times, each under its own target and namespace: see isa_avx512.cpp.
#pragma once

#define SMARTKV_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SMARTKV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SMARTKV_UNROLL _Pragma("GCC unroll 16")
#endif

namespace smartkv::SMARTKV_ISA {

typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint8_t v16u8 __attribute__((vector_size(16)));

// Two halves with the operators of a native vector.
template <class V>
struct Pair {
  V lo, hi;
};

#define SMARTKV_PAIR_OP(OP)                                  \
  template <class V>                                         \
  SMARTKV_INLINE Pair<V> operator OP(Pair<V> a, Pair<V> b) { \
    return {a.lo OP b.lo, a.hi OP b.hi};                     \
  }
SMARTKV_PAIR_OP(+)
SMARTKV_PAIR_OP(-)
SMARTKV_PAIR_OP(*)
SMARTKV_PAIR_OP(/)
SMARTKV_PAIR_OP(&)
SMARTKV_PAIR_OP(|)
SMARTKV_PAIR_OP(^)
#undef SMARTKV_PAIR_OP

template <class V>
SMARTKV_INLINE Pair<V> operator<<(Pair<V> a, int n) {
  return {a.lo << n, a.hi << n};
}
template <class V>
SMARTKV_INLINE Pair<V> operator>>(Pair<V> a, int n) {
  return {a.lo >> n, a.hi >> n};
}

#if defined(SMARTKV_AVX512)
typedef v16f F;
typedef v16i I;
#elif defined(SMARTKV_AVX2)
typedef Pair<v8f> F;
typedef Pair<v8i> I;
#else
typedef Pair<Pair<v4f> > F;
typedef Pair<Pair<v4i> > I;
#endif

// Shuffles with lane lists computed at compile time.
template <int... LANE>
struct Lanes {};
SMARTKV_INLINE Lanes<0, 1, 2, 3> lanes_of(v4f) { return {}; }
SMARTKV_INLINE Lanes<0, 1, 2, 3, 4, 5, 6, 7> lanes_of(v8f) { return {}; }
SMARTKV_INLINE Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> lanes_of(v16f) {
  return {};
}
#if defined(__clang__)
#define SMARTKV_SHUFFLE(a, b, INTS, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SMARTKV_SHUFFLE(a, b, INTS, ...) __builtin_shuffle(a, b, INTS{__VA_ARGS__})
#endif

// ---- operations on one native register ----

#define SMARTKV_NATIVE_OPS(VF, VI, VU)                                                      \
  SMARTKV_INLINE VI multiply_low(VI a, VI b) { return (VI)((VU)a * (VU)b); }                \
  SMARTKV_INLINE VI gt(VF a, VF b) { return (VI)(a > b); }                                  \
  SMARTKV_INLINE VI gt(VI a, VI b) { return (VI)(a > b); }                                  \
  SMARTKV_INLINE VF select(VI mask, VF a, VF b) { return mask ? a : b; }                    \
  SMARTKV_INLINE VF to_float(VI a) { return __builtin_convertvector(a, VF); }               \
  SMARTKV_INLINE VF as_float(VI a) { return (VF)a; }                                        \
  SMARTKV_INLINE VI as_int(VF a) { return (VI)a; }                                          \
  SMARTKV_INLINE void load_to(VF& v, const float* p) { __builtin_memcpy(&v, p, sizeof v); } \
  SMARTKV_INLINE void load_to(VI& v, const void* p) { __builtin_memcpy(&v, p, sizeof v); }  \
  SMARTKV_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }          \
  SMARTKV_INLINE void store(int32_t* p, VI v) { __builtin_memcpy(p, &v, sizeof v); }        \
  SMARTKV_INLINE void splat_to(VF& v, float x) { v = x - VF{}; }                            \
  SMARTKV_INLINE void splat_to(VI& v, int32_t x) { v = x - VI{}; }

SMARTKV_NATIVE_OPS(v4f, v4i, v4u)
#if defined(SMARTKV_AVX512)
SMARTKV_NATIVE_OPS(v16f, v16i, v16u)
SMARTKV_INLINE v16f fma(v16f a, v16f b, v16f c) {
  return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SMARTKV_INLINE v16f vmax(v16f a, v16f b) { return (v16f)_mm512_max_ps((__m512)a, (__m512)b); }
SMARTKV_INLINE v16f vmin(v16f a, v16f b) { return (v16f)_mm512_min_ps((__m512)a, (__m512)b); }
SMARTKV_INLINE v16i round_int(v16f a) { return (v16i)_mm512_cvtps_epi32((__m512)a); }
#elif defined(SMARTKV_AVX2)
SMARTKV_NATIVE_OPS(v8f, v8i, v8u)
SMARTKV_INLINE v8f fma(v8f a, v8f b, v8f c) {
  return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SMARTKV_INLINE v8f vmax(v8f a, v8f b) { return (v8f)_mm256_max_ps((__m256)a, (__m256)b); }
SMARTKV_INLINE v8f vmin(v8f a, v8f b) { return (v8f)_mm256_min_ps((__m256)a, (__m256)b); }
SMARTKV_INLINE v8i round_int(v8f a) { return (v8i)_mm256_cvtps_epi32((__m256)a); }
#else
SMARTKV_INLINE v4f fma(v4f a, v4f b, v4f c) { return a * b + c; }
SMARTKV_INLINE v4f vmax(v4f a, v4f b) { return a > b ? a : b; }
SMARTKV_INLINE v4f vmin(v4f a, v4f b) { return a < b ? a : b; }
SMARTKV_INLINE v4i round_int(v4f a) {
#if defined(__SSE2__)
  return (v4i)_mm_cvtps_epi32((__m128)a);
#else
  // Not the add-a-big-number trick: contracted with a product it would round only once.
  v4i r;
  for (int i = 0; i < 4; ++i) r[i] = static_cast<int32_t>(__builtin_rintf(a[i]));
  return r;
#endif
}
#endif

// Hides a value from contraction into FMA: encoding must round alike in every kernel set.
SMARTKV_INLINE void keep(v4f& a) {
#if defined(__x86_64__)
  __asm__("" : "+x"(a));
#elif defined(__aarch64__)
  __asm__("" : "+w"(a));
#endif
}
#if defined(SMARTKV_AVX512)
SMARTKV_INLINE void keep(v16f& a) { __asm__("" : "+v"(a)); }
#elif defined(SMARTKV_AVX2)
SMARTKV_INLINE void keep(v8f& a) { __asm__("" : "+x"(a)); }
#endif

#undef SMARTKV_NATIVE_OPS

// ---- the same on pairs ----

template <class V>
SMARTKV_INLINE auto gt(Pair<V> a, Pair<V> b) {
  return Pair<decltype(gt(a.lo, b.lo))>{gt(a.lo, b.lo), gt(a.hi, b.hi)};
}
template <class M, class V>
SMARTKV_INLINE Pair<V> select(Pair<M> mask, Pair<V> a, Pair<V> b) {
  return {select(mask.lo, a.lo, b.lo), select(mask.hi, a.hi, b.hi)};
}
template <class V>
SMARTKV_INLINE Pair<V> fma(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class V>
SMARTKV_INLINE Pair<V> multiply_low(Pair<V> a, Pair<V> b) {
  return {multiply_low(a.lo, b.lo), multiply_low(a.hi, b.hi)};
}
template <class V>
SMARTKV_INLINE Pair<V> vmax(Pair<V> a, Pair<V> b) {
  return {vmax(a.lo, b.lo), vmax(a.hi, b.hi)};
}
template <class V>
SMARTKV_INLINE Pair<V> vmin(Pair<V> a, Pair<V> b) {
  return {vmin(a.lo, b.lo), vmin(a.hi, b.hi)};
}
#define SMARTKV_PAIR_MAP(NAME)                                 \
  template <class V>                                           \
  SMARTKV_INLINE auto NAME(Pair<V> a) {                        \
    return Pair<decltype(NAME(a.lo))>{NAME(a.lo), NAME(a.hi)}; \
  }
SMARTKV_PAIR_MAP(to_float)
SMARTKV_PAIR_MAP(as_float)
SMARTKV_PAIR_MAP(as_int)
SMARTKV_PAIR_MAP(round_int)
#undef SMARTKV_PAIR_MAP
template <class V>
SMARTKV_INLINE void keep(Pair<V>& a) {
  keep(a.lo);
  keep(a.hi);
}
template <class V, class T>
SMARTKV_INLINE void load_to(Pair<V>& v, const T* p) {
  load_to(v.lo, p);
  load_to(v.hi, reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + sizeof v.lo));
}
template <class V, class T>
SMARTKV_INLINE void store(T* p, Pair<V> v) {
  store(p, v.lo);
  store(p + sizeof v.lo / sizeof(T), v.hi);
}
template <class V, class T>
SMARTKV_INLINE void splat_to(Pair<V>& v, T x) {
  splat_to(v.lo, x);
  v.hi = v.lo;
}

// ---- what kernels call ----

SMARTKV_INLINE F load(const float* p) {
  F v;
  load_to(v, p);
  return v;
}
// 16 little-endian 32-bit words at any address.
SMARTKV_INLINE I load_words(const void* p) {
  I v;
  load_to(v, static_cast<const char*>(p));
  return v;
}
SMARTKV_INLINE F splat(float x) {
  F v;
  splat_to(v, x);
  return v;
}
SMARTKV_INLINE I splat(int32_t x) {
  I v;
  splat_to(v, x);
  return v;
}

// Reduction by halves, always the same tree.
SMARTKV_INLINE v4f halve_sum(v4f a) { return a; }
SMARTKV_INLINE v4f halve_max(v4f a) { return a; }
#if defined(SMARTKV_AVX512) || defined(SMARTKV_AVX2)
SMARTKV_INLINE Pair<v4f> split(v8f a) {
  return {(v4f)_mm256_castps256_ps128((__m256)a), (v4f)_mm256_extractf128_ps((__m256)a, 1)};
}
SMARTKV_INLINE v4f halve_sum(v8f a) {
  const Pair<v4f> p = split(a);
  return p.lo + p.hi;
}
SMARTKV_INLINE v4f halve_max(v8f a) {
  const Pair<v4f> p = split(a);
  return (v4f)_mm_max_ps((__m128)p.lo, (__m128)p.hi);
}
#endif
#if defined(SMARTKV_AVX512)
SMARTKV_INLINE Pair<v8f> split(v16f a) {
  return {(v8f)_mm512_castps512_ps256((__m512)a), (v8f)_mm512_extractf32x8_ps((__m512)a, 1)};
}
SMARTKV_INLINE v4f halve_sum(v16f a) {
  const Pair<v8f> p = split(a);
  return halve_sum(p.lo + p.hi);
}
SMARTKV_INLINE v4f halve_max(v16f a) {
  const Pair<v8f> p = split(a);
  return halve_max((v8f)_mm256_max_ps((__m256)p.lo, (__m256)p.hi));
}
#endif
template <class V>
SMARTKV_INLINE v4f halve_sum(Pair<V> a) {
  return halve_sum(a.lo + a.hi);
}
template <class V>
SMARTKV_INLINE v4f halve_max(Pair<V> a) {
  return halve_max(vmax(a.lo, a.hi));
}
SMARTKV_INLINE float hsum(F a) {
  const v4f s = halve_sum(a);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
SMARTKV_INLINE float hmax(F a) {
  const v4f s = halve_max(a);
  const float even = s[0] > s[2] ? s[0] : s[2], odd = s[1] > s[3] ? s[1] : s[3];
  return even > odd ? even : odd;
}

// 16-entry table of floats; only the low four bits of an index count.
struct Lookup {
#if defined(SMARTKV_AVX512)
  v16f table;
  SMARTKV_INLINE explicit Lookup(const float* entries) { load_to(table, entries); }
  SMARTKV_INLINE F operator()(I index) const {
    return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
  }
#elif defined(SMARTKV_AVX2)
  Pair<v8f> table;
  SMARTKV_INLINE explicit Lookup(const float* entries) { load_to(table, entries); }
  SMARTKV_INLINE v8f half(v8i index) const {
    const __m256i i = (__m256i)index;
    return (v8f)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)table.lo, i),
                                 _mm256_permutevar8x32_ps((__m256)table.hi, i),
                                 _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  SMARTKV_INLINE F operator()(I index) const { return {half(index.lo), half(index.hi)}; }
#else
  const float* table;
  SMARTKV_INLINE explicit Lookup(const float* entries) : table(entries) {}
  SMARTKV_INLINE v4f quarter(v4i i) const {
    return v4f{table[i[0] & 15], table[i[1] & 15], table[i[2] & 15], table[i[3] & 15]};
  }
  SMARTKV_INLINE F operator()(I index) const {
    return {{quarter(index.lo.lo), quarter(index.lo.hi)},
            {quarter(index.hi.lo), quarter(index.hi.hi)}};
  }
#endif
};

// exp to about 2 ulp; below -87 it stays at the smallest normal, so mask what must be zero. NaN
// stays NaN, here and below: of two operands vmax and vmin give the second where one of them is
// NaN.
SMARTKV_INLINE F exp(F x) {
  x = vmin(splat(88.0f), vmax(splat(-87.0f), x));
  const I n = round_int(x * splat(1.44269504f));
  const F k = to_float(n);
  F r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return as_float(as_int(p) + (n << 23));
}

// 2^x for x below 127, relative error below 4e-6 beside that of x; next to 0 below -126.
SMARTKV_INLINE F exp2_fast(F x) {
  x = vmax(splat(-126.0f), x);
#if defined(SMARTKV_AVX512)
  const F k = (F)_mm512_roundscale_ps((__m512)x, 0);
#else
  const I n = round_int(x);
  const F k = to_float(n);
#endif
  const F r = x - k;
  F p = fma(splat(1.33335581e-3f), r, splat(9.61812911e-3f));
  p = fma(p, r, splat(5.55041087e-2f));
  p = fma(p, r, splat(2.40226507e-1f));
  p = fma(p, r, splat(6.93147181e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(SMARTKV_AVX512)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  return as_float(as_int(p) + (n << 23));
#endif
}

}  // namespace smartkv::SMARTKV_ISA

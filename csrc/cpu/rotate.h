// Orthonormal Hadamard rotation of one head vector, vectorised inside the vector.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Butterfly of lane distance H < 16: (a, b) -> (a + b, a - b).
template <int H, class V, int... LANE>
SMARTKV_INLINE V butterfly_lanes(V x, Lanes<LANE...>) {
  typedef decltype(as_int(x)) INTS;
  const V other = SMARTKV_SHUFFLE(x, x, INTS, (LANE ^ H)...);
  const V sign = {(LANE & H ? -1.0f : 1.0f)...};
  return fma(x, sign, other);  // the product is exact: rounded once, with or without FMA
}
template <int H, class V>
SMARTKV_INLINE V butterfly(V x) {
  return butterfly_lanes<H>(x, lanes_of(x));
}
template <int H, class V>
SMARTKV_INLINE Pair<V> butterfly(Pair<V> x) {
  if constexpr (sizeof(V) == H * sizeof(float)) {
    return {x.lo + x.hi, x.lo - x.hi};
  } else {
    return {butterfly<H>(x.lo), butterfly<H>(x.hi)};
  }
}

// Order-m block: out[i] = sum over j of P[i][j] x[j] (or P^T) on rows of N floats.
template <int ORDER, int N>
inline void multiply_paley(float* x, bool inverse) {
  static constexpr PaleyMatrix<ORDER> PALEY = make_paley<ORDER>();
  alignas(64) float in[ORDER * N];
  __builtin_memcpy(in, x, sizeof in);
  for (int i = 0; i < ORDER; ++i) {
    v4f sum[N / 4] = {};
    for (int j = 0; j < ORDER; ++j) {
      const float sign = inverse ? PALEY.at[j][i] : PALEY.at[i][j];
      for (int n = 0; n < N / 4; ++n) {
        v4f row;
        load_to(row, in + j * N + 4 * n);
        sum[n] = sum[n] + sign * row;
      }
    }
    for (int n = 0; n < N / 4; ++n) store(x + i * N + 4 * n, sum[n]);
  }
}

template <int HEAD_DIM>
inline void rotate_fixed(float* x, bool inverse) {
  constexpr int M = paley_order(HEAD_DIM), N = sylvester_order(HEAD_DIM), VECS = HEAD_DIM / 16;
  F y[VECS];
  SMARTKV_UNROLL
  for (int i = 0; i < VECS; ++i) {
    y[i] = butterfly<2>(butterfly<1>(load(x + 16 * i)));
    if constexpr (N >= 8) y[i] = butterfly<4>(y[i]);
    if constexpr (N >= 16) y[i] = butterfly<8>(y[i]);
  }
  if constexpr (N >= 16) {
    SMARTKV_UNROLL
    for (int h = 1; h < VECS; h *= 2) {
      SMARTKV_UNROLL
      for (int i = 0; i < VECS; ++i) {
        if (i & h) continue;
        const F a = y[i], b = y[i + h];
        y[i] = a + b;
        y[i + h] = a - b;
      }
    }
  }
  const F scale = splat(rotation_scale(HEAD_DIM));
  if constexpr (M > 1) {
    for (int i = 0; i < VECS; ++i) store(x + 16 * i, y[i]);
    multiply_paley<M, N>(x, inverse);
    for (int i = 0; i < VECS; ++i) y[i] = load(x + 16 * i);
  }
  for (int i = 0; i < VECS; ++i) {
    F scaled = y[i] * scale;
    keep(scaled);
    store(x + 16 * i, scaled);
  }
}

inline void rotate(float* x, int head_dim, bool inverse = false) {
  switch (head_dim) {
    case 64:
      return rotate_fixed<64>(x, inverse);
    case 80:
      return rotate_fixed<80>(x, inverse);
    case 96:
      return rotate_fixed<96>(x, inverse);
    case 128:
      return rotate_fixed<128>(x, inverse);
    default:
      return rotate_fixed<256>(x, inverse);
  }
}

}  // namespace smartkv::SMARTKV_ISA

// Products of few query rows with plain rows of K and V, read where they lie: the window and the
// 16-bit tier in a decode step. Many rows use the decoded tile instead.
#pragma once

namespace smartkv::SMARTKV_ISA {

#if defined(SMARTKV_AVX512)
constexpr int DENSE_ROWS = 8, DENSE_SUMS = 16;
#elif defined(SMARTKV_AVX2)
constexpr int DENSE_ROWS = 8, DENSE_SUMS = 4;
#else
constexpr int DENSE_ROWS = 4, DENSE_SUMS = 2;
#endif

// Lane i: the sum of the lanes of x[i].
SMARTKV_INLINE F sum_lanes(F (&x)[16]) {
  const auto halve = [&]<int H>() {
    SMARTKV_UNROLL
    for (int i = 0; i < H; ++i) {
      exchange<H>(x[i], x[i + H]);
      x[i] = x[i] + x[i + H];
    }
  };
  halve.template operator()<8>();
  halve.template operator()<4>();
  halve.template operator()<2>();
  halve.template operator()<1>();
  return x[0];
}

// scores[r][t] = q[r] . K[t]; columns past rows.count are left as they are.
template <DType DTYPE, int ROWS>
inline void dense_k(const Rows& rows, Lines& fetch, int head_dim, const float* q, float* scores) {
  constexpr int PADDED = ROWS == 3 ? 4 : ROWS, TOKENS = 16 / PADDED;
  constexpr int STEP = DENSE_SUMS / PADDED > 0 ? DENSE_SUMS / PADDED : 1;
  for (int token = 0; token < rows.count; token += TOKENS) {
    F sum[16];
    SMARTKV_UNROLL
    for (int i = 0; i < 16; ++i) sum[i] = splat(0.0f);
    SMARTKV_UNROLL
    for (int first = 0; first < TOKENS; first += STEP) {
      const char* row[STEP];
      SMARTKV_UNROLL
      for (int t = 0; t < STEP; ++t) {
        const int n = token + first + t;
        row[t] = rows.data + (n < rows.count ? n : rows.count - 1) * rows.stride;
      }
      for (int c = 0; c < head_dim; c += 16) {
        const bool is_line = c * dtype_size(DTYPE) % 64 == 0;
        SMARTKV_UNROLL
        for (int t = 0; t < STEP; ++t) {
          if (is_line) fetch_row(rows, fetch, row[t] + c * dtype_size(DTYPE));
          const F x = load_values<DTYPE>(row[t], c);
          SMARTKV_UNROLL
          for (int r = 0; r < ROWS; ++r) {
            F& s = sum[r * TOKENS + first + t];
            s = fma(x, load(q + r * head_dim + c), s);
          }
        }
      }
    }
    alignas(64) float totals[16];
    store(totals, sum_lanes(sum));
    for (int r = 0; r < ROWS; ++r) {
      __builtin_memcpy(scores + r * PAGE_SIZE + token, totals + r * TOKENS, TOKENS * sizeof(float));
    }
  }
}

// out[r][c..] += sum over visible t of p[r][t] V[t][c..] for VECS vectors of channels. Rows that
// nobody sees may hold NaN and are not read.
template <DType DTYPE, int ROWS, int VECS>
inline void dense_v_columns(const Rows& rows, Lines& fetch, uint64_t visible, int head_dim,
                            const float* p, float* out, int c) {
  F sum[ROWS][VECS];
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) sum[r][v] = load(out + r * head_dim + c + 16 * v);
  }
  for (; visible != 0; visible &= visible - 1) {
    const int n = __builtin_ctzll(visible);
    const char* row = rows.data + n * rows.stride;
    F x[VECS];
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) {
      const int at = (c + 16 * v) * dtype_size(DTYPE);
      if (at % 64 == 0) fetch_row(rows, fetch, row + at);
      x[v] = load_values<DTYPE>(row, c + 16 * v);
    }
    multiply_add<ROWS, VECS>(sum, x, p + n, PAGE_SIZE);
  }
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) store(out + r * head_dim + c + 16 * v, sum[r][v]);
  }
}

template <DType DTYPE, int ROWS>
inline void dense_v(const Rows& rows, Lines& fetch, uint64_t visible, int head_dim, const float* p,
                    float* out) {
  constexpr int VECS = FUSED_VECS;
  int c = 0;
  for (; c + 16 * VECS <= head_dim; c += 16 * VECS) {
    dense_v_columns<DTYPE, ROWS, VECS>(rows, fetch, visible, head_dim, p, out, c);
  }
  for (; c < head_dim; c += 16) {
    dense_v_columns<DTYPE, ROWS, 1>(rows, fetch, visible, head_dim, p, out, c);
  }
}

inline void dense_k_rows(const Rows& rows, Lines fetch, int head_dim, int count, const float* q,
                         float* scores) {
  with_dtype(rows.dtype, [&]<DType DTYPE>() {
    for (int r = 0; r < count; r += FUSED_BLOCK) {
      with_rows(count - r, [&]<int ROWS>() {
        dense_k<DTYPE, ROWS>(rows, fetch, head_dim, q + r * head_dim, scores + r * PAGE_SIZE);
      });
    }
  });
}

inline void dense_v_rows(const Rows& rows, Lines fetch, uint64_t visible, int head_dim, int count,
                         const float* p, float* out) {
  with_dtype(rows.dtype, [&]<DType DTYPE>() {
    for (int r = 0; r < count; r += FUSED_BLOCK) {
      with_rows(count - r, [&]<int ROWS>() {
        dense_v<DTYPE, ROWS>(rows, fetch, visible, head_dim, p + r * PAGE_SIZE, out + r * head_dim);
      });
    }
  });
}

}  // namespace smartkv::SMARTKV_ISA

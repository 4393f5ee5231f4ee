// Register-blocked C (+)= A B for small fp32 matrices: both products of attention and the gate.
#pragma once

namespace smartkv::SMARTKV_ISA {

#if defined(SMARTKV_AVX512)
constexpr int GEMM_ROWS = 4, GEMM_VECS = 4;
#elif defined(SMARTKV_AVX2)
constexpr int GEMM_ROWS = 4, GEMM_VECS = 1;
#else
constexpr int GEMM_ROWS = 2, GEMM_VECS = 1;
#endif

// A [rows, depth], B [depth, columns], C [rows, columns]; columns is a multiple of 16.
struct Gemm {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int depth;
};

template <int ROWS, int VECS, bool ACCUMULATE>
inline void gemm_block(const Gemm& g, int64_t row, int64_t column) {
  const float* a = g.a + row * g.lda;
  const float* b = g.b + column;
  float* c = g.c + row * g.ldc + column;
  F sum[ROWS][VECS];
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) {
      sum[r][v] = ACCUMULATE ? load(c + r * g.ldc + 16 * v) : splat(0.0f);
    }
  }
  for (int k = 0; k < g.depth; ++k) {
    F x[VECS];
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) x[v] = load(b + k * g.ldb + 16 * v);
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const F y = splat(a[r * g.lda + k]);
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) sum[r][v] = fma(y, x[v], sum[r][v]);
    }
  }
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) store(c + r * g.ldc + 16 * v, sum[r][v]);
  }
}

template <int VECS, bool ACCUMULATE>
inline void gemm_rows(const Gemm& g, int64_t rows, int64_t column) {
  int64_t row = 0;
  for (; row + GEMM_ROWS <= rows; row += GEMM_ROWS) {
    gemm_block<GEMM_ROWS, VECS, ACCUMULATE>(g, row, column);
  }
  if constexpr (GEMM_ROWS > 2) {
    for (; row + 2 <= rows; row += 2) gemm_block<2, VECS, ACCUMULATE>(g, row, column);
  }
  if (row < rows) gemm_block<1, VECS, ACCUMULATE>(g, row, column);
}

template <bool ACCUMULATE>
inline void gemm(const Gemm& g, int64_t rows, int64_t columns) {
  int64_t column = 0;
  for (; column + 16 * GEMM_VECS <= columns; column += 16 * GEMM_VECS) {
    gemm_rows<GEMM_VECS, ACCUMULATE>(g, rows, column);
  }
  if constexpr (GEMM_VECS > 2) {
    for (; column + 32 <= columns; column += 32) gemm_rows<2, ACCUMULATE>(g, rows, column);
  }
  for (; column < columns; column += 16) gemm_rows<1, ACCUMULATE>(g, rows, column);
}

}  // namespace smartkv::SMARTKV_ISA

// A head vector in the registers of half a warp, and its orthonormal Hadamard rotation. Sums are in
// the order of the CPU kernels, so that codes are equal.
#pragma once

#include "scalar.h"
#include "smartkv/hadamard.h"

namespace smartkv {

constexpr int HALF_WARP = 16;

// Lane l of the half holds the channels l, l + 16, ...
template <int HEAD_DIM>
struct HeadRow {
  float at[HEAD_DIM / HALF_WARP];
};

// Sign bits of row `row` of the Paley matrix, or of its transpose: bit j is set for +1.
template <int ORDER>
__device__ __forceinline__ unsigned paley_row(int row, bool transposed) {
  constexpr int Q = ORDER - 1;
  constexpr unsigned SQUARES = [] {
    unsigned squares = 0;
    for (int i = 1; i < Q; ++i) squares |= 1u << i * i % Q;
    return squares;
  }();
  unsigned signs = 0;
#pragma unroll
  for (int column = 0; column < ORDER; ++column) {
    const int i = transposed ? column : row, j = transposed ? row : column;
    const int difference = i - j < 0 ? i - j + Q : i - j;
    const bool plus = i == j || i == 0 || (j > 0 && (SQUARES >> difference & 1));
    signs |= static_cast<unsigned>(plus) << column;
  }
  return signs;
}

// out[i * N + n] = sum over j of P[i][j] x[j * N + n].
template <int HEAD_DIM>
__device__ __forceinline__ void multiply_paley(HeadRow<HEAD_DIM>& x, bool inverse) {
  constexpr int ORDER = paley_order(HEAD_DIM), N = sylvester_order(HEAD_DIM);
  constexpr int ROWS = HEAD_DIM / HALF_WARP;
  const int lane = threadIdx.x % HALF_WARP;
  HeadRow<HEAD_DIM> sum{};
  unsigned signs[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    signs[r] = paley_row<ORDER>((lane + HALF_WARP * r) / N, inverse);
  }
#pragma unroll
  for (int j = 0; j < ORDER; ++j) {
    const int source = j * N % HALF_WARP + lane % N;
    const float value = __shfl_sync(ALL_LANES, x.at[j * N / HALF_WARP], source, HALF_WARP);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum.at[r] += signs[r] >> j & 1 ? value : -value;
  }
  x = sum;
}

// Both halves of the warp rotate a row of their own.
template <int HEAD_DIM>
__device__ __forceinline__ void rotate(HeadRow<HEAD_DIM>& x, bool inverse) {
  constexpr int N = sylvester_order(HEAD_DIM), ROWS = HEAD_DIM / HALF_WARP;
  const int lane = threadIdx.x % HALF_WARP;
#pragma unroll
  for (int h = 1; h < HALF_WARP && h < N; h *= 2) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float other = __shfl_xor_sync(ALL_LANES, x.at[r], h);
      x.at[r] = (lane & h) != 0 ? other - x.at[r] : other + x.at[r];
    }
  }
  if constexpr (N > HALF_WARP) {
#pragma unroll
    for (int h = 1; h < ROWS; h *= 2) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (r & h) continue;
        const float a = x.at[r], b = x.at[r + h];
        x.at[r] = a + b;
        x.at[r + h] = a - b;
      }
    }
  }
  if constexpr (N < HALF_WARP) multiply_paley(x, inverse);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) x.at[r] = __fmul_rn(x.at[r], rotation_scale(HEAD_DIM));
}

}  // namespace smartkv

// Online softmax of a warp over the tokens of its quarters. Scores are in powers of two; a thread
// has the tokens 2g and 2g + 1 and the rows 8n + 2t and 8n + 2t + 1, as the result of m16n8k16.
#pragma once

#include "attention_run.h"
#include "ptx.h"

namespace smartkv {

// Weights are at most 2^14 as float16, so that small ones are not lost below its normal range.
constexpr int WEIGHT_EXPONENT = 14;

template <int ROW_TILES>
struct RowState {
  float max[ROW_TILES][2], sum[ROW_TILES][2];  // the sum is of this thread's tokens
  int value_exponent;                          // V scales of the tokens so far are below 2^this

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
      max[n][0] = max[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0;
    }
    value_exponent = -100;
  }

  // Of an accumulator that took weights of tokens().
  __device__ __forceinline__ float unit() const {
    return exp2f(static_cast<float>(value_exponent - WEIGHT_EXPONENT));
  }
};

// Two weights in the operand's type, and what rounding took away of each.
template <DType DTYPE>
__device__ __forceinline__ unsigned pack_weights(float& a, float& b) {
  uint16_t x, y;
  if constexpr (DTYPE == DType::FLOAT16) {
    const __half p = __float2half_rn(a), q = __float2half_rn(b);
    a -= to_float(p);
    b -= to_float(q);
    x = __half_as_ushort(p);
    y = __half_as_ushort(q);
  } else {
    const __nv_bfloat16 p = __float2bfloat16_rn(a), q = __float2bfloat16_rn(b);
    a -= to_float(p);
    b -= to_float(q);
    x = __bfloat16_as_ushort(p);
    y = __bfloat16_as_ushort(q);
  }
  return x | static_cast<unsigned>(y) << 16;
}

// Replaces scores (-inf: not seen) by weights, as operands B of V^T: [row tile][term][pair].
// v_scale: of this thread's two tokens, 0 where no row sees it. `shrink`: what accumulators of this
// thread's rows have to be multiplied with first. Returns false where nothing is seen at all.
template <DType DTYPE, int TERMS, int ROW_TILES>
__device__ __forceinline__ bool weigh(RowState<ROW_TILES>& state, float (&scores)[ROW_TILES][4],
                                      const float (&v_scale)[2],
                                      unsigned (&weights)[ROW_TILES][TERMS][2],
                                      float (&shrink)[ROW_TILES][2], int terms) {
  float top[ROW_TILES][2];
  bool seen = false;
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // A NaN is no maximum, but is in the sum.
      seen = seen || !(scores[n][e] == -INFINITY && scores[n][e + 2] == -INFINITY);
      top[n][e] = fmaxf(scores[n][e], scores[n][e + 2]);
    }
  }
  if (!__any_sync(ALL_LANES, seen)) return false;
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int mask = 4; mask < WARP; mask *= 2) {
        top[n][e] = fmaxf(top[n][e], __shfl_xor_sync(ALL_LANES, top[n][e], mask));
      }
    }
  }
  // Exponent e with all V scales below 2^e: positive floats are ordered like their bits.
  const unsigned largest =
      __reduce_max_sync(ALL_LANES, __float_as_uint(fmaxf(v_scale[0], v_scale[1])));
  const int exponent = max(static_cast<int>(largest >> 23) - 126, state.value_exponent);
  const float value_shrink = exp2f(static_cast<float>(state.value_exponent - exponent));
  state.value_exponent = exponent;
  const float unit = exp2f(static_cast<float>(WEIGHT_EXPONENT - exponent));
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
    float p[4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float old = state.max[n][e], now = fmaxf(old, top[n][e]);
      const float base = now == -INFINITY ? 0.0f : now;
      const float factor = exp2f(old - base);
      state.max[n][e] = now;
      shrink[n][e] = factor * value_shrink;
      const float first = exp2f(scores[n][e] - base), second = exp2f(scores[n][e + 2] - base);
      state.sum[n][e] = state.sum[n][e] * factor + (first + second);
      p[e] = first * (v_scale[0] * unit);
      p[e + 2] = second * (v_scale[1] * unit);
    }
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
      if (term >= terms) break;
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        const unsigned rows = pack_weights<DTYPE>(p[2 * token], p[2 * token + 1]);
        weights[n][term][token] = transpose_matrix(rows);
      }
    }
  }
  return true;
}

}  // namespace smartkv

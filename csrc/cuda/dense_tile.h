// 16 tokens of the window, or of a page of 16 bits, as operands of m16n8k16. bfloat16 and float16
// go through shared memory; float32 is read value by value and split into three bfloat16.
#pragma once

#include "code_tile.h"

namespace smartkv {

// Where the rows of one head are: those of a page, or of the window.
struct DenseRows {
  const char *k, *v;
  int64_t k_stride, v_stride;  // bytes
  const int32_t* positions;
  int count;    // tokens
  bool copies;  // rows are aligned to 16 bytes
};

template <int HEAD_DIM, DType DTYPE>
struct DenseTile {
  static constexpr bool IS_SPLIT = DTYPE == DType::FLOAT32;
  static constexpr int TERMS = IS_SPLIT ? MAX_TERMS : 1;
  static constexpr int MATRICES = HEAD_DIM / 16;
  static constexpr int ROW = 2 * HEAD_DIM + 16;  // bytes; padded against bank conflicts
  static constexpr int V = WARP_TOKENS * ROW;
  static constexpr int STAGE_BYTES = IS_SPLIT ? 16 : 2 * WARP_TOKENS * ROW;

  // Tokens that no row sees become zeros: their values may be NaN, which no weight of zero undoes.
  static __device__ __forceinline__ void load(unsigned char* stage, const DenseRows& rows,
                                              int first, int position, bool with_v) {
    if constexpr (IS_SPLIT) return;
    const int lane = threadIdx.x % WARP;
    for (int i = lane; i < WARP_TOKENS * HEAD_DIM / 8; i += WARP) {
      const int token = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8) * 16;
      const bool valid = __shfl_sync(ALL_LANES, position, token) >= 0;
      const char* const k = rows.k + (first + token) * rows.k_stride + chunk;
      const char* const v = rows.v + (first + token) * rows.v_stride + chunk;
      unsigned char* const to = stage + token * ROW + chunk;
      if (rows.copies) {
        copy_async(to, valid ? k : rows.k, valid);
        if (with_v) copy_async(to + V, valid ? v : rows.v, valid);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 16; j += 2) {
        const auto value = [&](const char* from) {
          return valid ? *reinterpret_cast<const uint16_t*>(from + j) : uint16_t{0};
        };
        *reinterpret_cast<uint16_t*>(to + j) = value(k);
        if (with_v) *reinterpret_cast<uint16_t*>(to + V + j) = value(v);
      }
    }
  }

  static __device__ __forceinline__ void set_pair(Fragment (&out)[TERMS], int i, float a, float b) {
    uint16_t first[MAX_TERMS], second[MAX_TERMS];
    split_bf16(a, first);
    split_bf16(b, second);
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
      out[term].at[i] = first[term] | static_cast<unsigned>(second[term]) << 16;
    }
  }

  // Tokens 2g, 2g + 1 by the channels from 16 * block + 4t.
  static __device__ __forceinline__ void k_matrix(const unsigned char* stage, const DenseRows& rows,
                                                  int first, const bool (&valid)[2], int block,
                                                  Fragment (&out)[TERMS]) {
    const int g = threadIdx.x % WARP / 4, channel = block * 16 + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = 2 * g + row;
      if constexpr (IS_SPLIT) {
        const auto* const k =
            reinterpret_cast<const float*>(rows.k + (first + token) * rows.k_stride);
        float x[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (valid[row]) x[i] = k[channel + i];
        }
        set_pair(out, row, x[0], x[1]);
        set_pair(out, 2 + row, x[2], x[3]);
      } else {
        const uint2 words = *reinterpret_cast<const uint2*>(stage + token * ROW + 2 * channel);
        out[0].at[row] = words.x;
        out[0].at[2 + row] = words.y;
      }
    }
  }

  // Channels 16 * block + g (+ 8) by the tokens 4t, 4t + 2 and 4t + 1, 4t + 3.
  // valid_tokens: bit i for token i of the quarter.
  static __device__ __forceinline__ void v_matrix(const unsigned char* stage, const DenseRows& rows,
                                                  int first, unsigned valid_tokens, int block,
                                                  Fragment (&out)[TERMS]) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if constexpr (IS_SPLIT) {
      const auto value = [&](int token, int channel) {
        if (!(valid_tokens >> token & 1)) return 0.0f;
        return reinterpret_cast<const float*>(rows.v + (first + token) * rows.v_stride)[channel];
      };
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = block * 16 + g + 8 * (i % 2), token = 4 * t + i / 2;
        set_pair(out, i, value(token, channel), value(token + 2, channel));
      }
    } else {
      // Matrices in the order of A: even tokens and channels 0 to 7, channels 8 to 15, then odd.
      const int matrix = lane / 8, token = 2 * (lane % 8) + matrix / 2;
      load_matrices_transposed(out[0].at,
                               stage + V + token * ROW + 2 * (block * 16 + 8 * (matrix % 2)));
    }
  }

  // sum += a b, all products of terms that matter.
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Fragment (&a)[TERMS],
                                                  const unsigned (&b)[TERMS][2]) {
    if constexpr (DTYPE == DType::FLOAT16) {
      multiply_fp16(sum, a[0].at, b[0]);
    } else {
#pragma unroll
      for (int order = TERMS - 1; order >= 0; --order) {  // small products first
#pragma unroll
        for (int i = 0; i <= order; ++i) multiply_bf16(sum, a[i].at, b[order - i]);
      }
    }
  }
};

}  // namespace smartkv

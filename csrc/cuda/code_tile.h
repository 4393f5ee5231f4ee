// A quarter of a quantised page, 16 tokens, as operands of m16n8k16.
//
// The page format suits the tensor cores as it is. A word of K holds four channels of one token:
// the two halves of what a lane owns in A for one token. A word of V holds four tokens of one
// channel: the same for V^T. So tokens 2g and 2g + 1 are rows g and g + 8 of A, a lane's channels
// (or tokens) are 0 and 2, then 1 and 3 of its word, and no value ever moves between lanes.
#pragma once

#include "attention_run.h"
#include "ptx.h"

namespace smartkv {

constexpr int LANES_PER_MATRIX = 16;
// Between the rows of four tokens of V, so that lanes with different rows find other banks.
constexpr int V_ROW_PADDING = 32;
constexpr int MAX_STAGES = 6;

// Row (token, or channel) a and b, both pairs of columns, as float16.
struct Fragment {
  unsigned at[4];
};

// Two float16 of the bytes that `selector` names, each minus `bias`.
template <unsigned SELECTOR>
__device__ __forceinline__ unsigned expand_bytes(unsigned bytes, __half2 bias) {
  const unsigned biased = permute_bytes(bytes, 0x64646464u, SELECTOR);  // 1024 + byte
  __half2 pair;
  memcpy(&pair, &biased, sizeof pair);
  pair = __hsub2(pair, bias);
  unsigned out;
  memcpy(&out, &pair, sizeof out);
  return out;
}
constexpr unsigned EVEN_BYTES = 0x4240, ODD_BYTES = 0x4341;

__device__ __forceinline__ __half2 level_bias() {
  return {__ushort_as_half(0x6480), __ushort_as_half(0x6480)};  // 1024 + 128
}

// Codes 0, 2 and 1, 3 of one row.
struct RowPairs {
  unsigned even, odd;
};

// A word of eight nibbles, two per byte: the low and the high nibbles of its bytes.
template <int BITS>
__device__ __forceinline__ void expand_nibbles(unsigned word, const LevelBytes& levels,
                                               RowPairs& low, RowPairs& high) {
  // Bytes 0 and 2 become one selector, bytes 1 and 3 the other.
  const unsigned even_first = permute_bytes(word, 0, 0x3120);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const unsigned selector = odd ? even_first >> 16 : even_first;
    unsigned low_pair, high_pair;
    if constexpr (BITS == 4) {
      // A table of eight: for the other sign the nibble's bit 3 makes 0 of it.
      const unsigned negative = permute_bytes(levels.low[0], levels.low[1], selector);
      const unsigned positive = permute_bytes(levels.high[0], levels.high[1], selector ^ 0x8888u);
      const auto difference = [&](unsigned a, unsigned b) {
        __half2 x, y;
        memcpy(&x, &a, sizeof x);
        memcpy(&y, &b, sizeof y);
        x = __hsub2(x, y);
        memcpy(&a, &x, sizeof a);
        return a;
      };
      low_pair = difference(permute_bytes(positive, 0x64646464u, EVEN_BYTES),
                            permute_bytes(negative, 0x64646464u, EVEN_BYTES));
      high_pair = difference(permute_bytes(positive, 0x64646464u, ODD_BYTES),
                             permute_bytes(negative, 0x64646464u, ODD_BYTES));
    } else {
      const unsigned bytes = permute_bytes(levels.low[0], levels.low[1], selector);
      low_pair = expand_bytes<EVEN_BYTES>(bytes, level_bias());
      high_pair = expand_bytes<ODD_BYTES>(bytes, level_bias());
    }
    (odd ? low.odd : low.even) = low_pair;
    (odd ? high.odd : high.even) = high_pair;
  }
}

// Codes of K or of V.
template <int HEAD_DIM, int BITS>
struct CodeSection {
  static constexpr int WIDTH = code_planes(BITS).width[0];
  static constexpr int LANES = plane_lanes(HEAD_DIM, WIDTH);
  static constexpr int HIGH_LANES = BITS == 3 ? plane_lanes(HEAD_DIM, 1) : 0;
  static constexpr int SHIFTS = 8 / WIDTH;  // channels per byte lane
  static constexpr int BLOCKS = (LANES + LANES_PER_MATRIX - 1) / LANES_PER_MATRIX;
  static constexpr int MATRICES = BLOCKS * SHIFTS;  // of 16 channels
  // Of a quarter of a page.
  static constexpr int PART = WARP_TOKENS * LANES, HIGH_PART = WARP_TOKENS * HIGH_LANES;
  static constexpr int V_ROW = 4 * LANES + V_ROW_PADDING;
  static constexpr int V_HIGH_ROW = 4 * HIGH_LANES + V_ROW_PADDING;

  // Byte lanes `lane` (K: and the three behind it), all shifts, of the two rows of this thread.
  // high(l): the words of the plane of high bits at lane l.
  template <typename High>
  static __device__ __forceinline__ void expand(uint2 words, int lane, const LevelBytes& levels,
                                                const High& high, Fragment (&out)[SHIFTS]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const unsigned word = row == 0 ? words.x : words.y;
      RowPairs pairs[SHIFTS] = {};
      if constexpr (BITS == 8) {
        pairs[0] = {expand_bytes<EVEN_BYTES>(word, level_bias()),
                    expand_bytes<ODD_BYTES>(word, level_bias())};
      } else if constexpr (BITS == 4) {
        expand_nibbles<4>(word, levels, pairs[0], pairs[1]);
      } else {
        unsigned even = word & 0x33333333u, odd = word >> 2 & 0x33333333u;
        if constexpr (BITS == 3) add_high_bits(lane, row, high, even, odd);
        expand_nibbles<BITS>(even, levels, pairs[0], pairs[2]);
        expand_nibbles<BITS>(odd, levels, pairs[1], pairs[3]);
      }
#pragma unroll
      for (int u = 0; u < SHIFTS; ++u) {
        out[u].at[row] = pairs[u].even;
        out[u].at[2 + row] = pairs[u].odd;
      }
    }
  }

  template <typename High>
  static __device__ __forceinline__ void add_high_bits(int lane, int row, const High& high,
                                                       unsigned& even, unsigned& odd) {
    const auto word_of = [&](int l) {
      const uint2 words = high(l);
      return row == 0 ? words.x : words.y;
    };
    if constexpr (LANES == 2 * HIGH_LANES) {
      // The bits of a lane's four channels are every other bit of one byte.
      const bool upper = lane >= HIGH_LANES;
      const unsigned word = word_of(upper ? lane - HIGH_LANES : lane) >> (upper ? 1 : 0);
      even |= word << 2 & 0x44444444u;
      odd |= word & 0x44444444u;
    } else {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int channel = lane + LANES * u;
        const unsigned bit = word_of(channel % HIGH_LANES) >> channel / HIGH_LANES & 0x01010101u;
        (u % 2 == 0 ? even : odd) |= bit << (u < 2 ? 2 : 6);
      }
    }
  }
};

template <int HEAD_DIM, int TIER>
struct CodeTile {
  static constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
  static constexpr bool IS_EVEN = LAYOUT.k_bits == LAYOUT.v_bits;
  using KCodes = CodeSection<HEAD_DIM, LAYOUT.k_bits>;
  using VCodes = CodeSection<HEAD_DIM, LAYOUT.v_bits>;

  // Of one stage in shared memory. Lanes that fill up a matrix may be read from what lies behind.
  static constexpr int K = 0;
  static constexpr int K_HIGH = KCodes::PART;
  static constexpr int V = K_HIGH + KCodes::HIGH_PART;
  static constexpr int V_HIGH = V + WARP_TOKENS / 4 * VCodes::V_ROW;
  static constexpr int K_SCALE =
      V_HIGH + (LAYOUT.v_bits == 3 ? WARP_TOKENS / 4 * VCodes::V_HIGH_ROW : 0);
  static constexpr int V_SCALE = K_SCALE + 2 * WARP_TOKENS;
  static constexpr int POSITION = V_SCALE + 2 * WARP_TOKENS;
  static constexpr int STAGE_BYTES = POSITION + 4 * WARP_TOKENS;

  // Starts copies of 16 bytes by the lanes of a warp. V's rows of four tokens are padded.
  template <int BYTES>
  static __device__ __forceinline__ void copy_k(unsigned char* to, const uint8_t* from) {
    for (int i = threadIdx.x % WARP * 16; i < BYTES; i += WARP * 16) copy_async(to + i, from + i);
  }
  template <int BYTES>
  static __device__ __forceinline__ void copy_v(unsigned char* to, const uint8_t* from) {
    for (int i = threadIdx.x % WARP * 16; i < BYTES; i += WARP * 16) {
      copy_async(to + i + i / (BYTES / 4) * V_ROW_PADDING, from + i);
    }
  }

  // Starts the copies of a quarter of a page.
  static __device__ __forceinline__ void load(unsigned char* stage, const uint8_t* page,
                                              int quarter, bool with_v) {
    const uint8_t* const k = page + LAYOUT.k_codes;
    copy_k<KCodes::PART>(stage + K, k + quarter * KCodes::PART);
    if constexpr (LAYOUT.k_bits == 3) {
      copy_k<KCodes::HIGH_PART>(stage + K_HIGH,
                                k + PAGE_SIZE * KCodes::LANES + quarter * KCodes::HIGH_PART);
    }
    if (with_v) {
      const uint8_t* const v = page + LAYOUT.v_codes;
      copy_v<VCodes::PART>(stage + V, v + quarter * VCodes::PART);
      if constexpr (LAYOUT.v_bits == 3) {
        copy_v<VCodes::HIGH_PART>(stage + V_HIGH,
                                  v + PAGE_SIZE * VCodes::LANES + quarter * VCodes::HIGH_PART);
      }
    }
    const int lane = threadIdx.x % WARP;
    if (lane < 4) {
      copy_async(stage + POSITION + 16 * lane,
                 page + LAYOUT.position + quarter * 4 * WARP_TOKENS + 16 * lane);
    } else if (lane < 8) {
      const int64_t section = lane < 6 ? LAYOUT.k_scale : LAYOUT.v_scale;
      copy_async(stage + K_SCALE + 16 * (lane - 4),
                 page + section + quarter * 2 * WARP_TOKENS + lane % 2 * 16);
    }
  }

  // Matrices of K: tokens 2g, 2g + 1 by the channels from 16 * block + 4t + LANES * shift.
  static __device__ __forceinline__ void k_matrices(const unsigned char* stage, int block,
                                                    const LevelBytes& levels,
                                                    Fragment (&out)[KCodes::SHIFTS]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int lane = block * LANES_PER_MATRIX + 4 * t;
    const auto words_of = [&](int plane, int l) {
      return *reinterpret_cast<const uint2*>(stage + plane + l / 4 * 64 + 8 * g);
    };
    KCodes::expand(
        words_of(K, lane), lane, levels, [&](int l) { return words_of(K_HIGH, l); }, out);
  }

  // Matrices of V^T: channels 16 * block + 2g (+ 1) + LANES * shift by the tokens of the quarter.
  static __device__ __forceinline__ void v_matrices(const unsigned char* stage, int block,
                                                    const LevelBytes& levels,
                                                    Fragment (&out)[VCodes::SHIFTS]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int lane = block * LANES_PER_MATRIX + 2 * g;
    const auto words_of = [&](int plane, int row, int l) {
      return *reinterpret_cast<const uint2*>(stage + plane + t * row + 4 * l);
    };
    VCodes::expand(
        words_of(V, VCodes::V_ROW, lane), lane, levels,
        [&](int l) { return words_of(V_HIGH, VCodes::V_HIGH_ROW, l); }, out);
  }
};

}  // namespace smartkv

// One token record by one warp: the lower half of its lanes has the key, the upper half the value.
// Codes and scales are those of the CPU kernels, bit for bit.
#pragma once

#include "smartkv/levels.h"
#include "turns.h"

namespace smartkv {

constexpr float LARGEST_HALF = 65504.0f;

// Tables of the tiers of a cache, by value among the arguments of a kernel.
struct TierBooks {
  Codebook k, v;
};
struct Codebooks {
  TierBooks of_tier[MAX_TIERS];
};

inline TierBooks make_tier_books(int tier, Levels levels) {
  return {make_codebook(k_bits_of(tier), levels), make_codebook(v_bits_of(tier), levels)};
}

inline Codebooks make_codebooks(const int* tier_bits, int num_tiers, Levels levels) {
  Codebooks books{};
  for (int t = 0; t < num_tiers; ++t) books.of_tier[t] = make_tier_books(tier_bits[t], levels);
  return books;
}

// The codes of a key and a value, for the lanes to regroup. Zeros behind head_dim: a plane's lanes
// may reach beyond it.
struct CodeScratch {
  alignas(16) uint8_t codes[2][MAX_HEAD_DIM + 32];
};

__device__ __forceinline__ bool is_value_half() { return threadIdx.x % WARP >= HALF_WARP; }

// Entries of the ascending m that are strictly below x.
template <int COUNT>
__device__ __forceinline__ int count_below(const float (&m)[COUNT], float x) {
  if constexpr (COUNT == 1) {
    return x > m[0];
  } else {
    constexpr int HALF = COUNT / 2;
    const bool above = x > m[HALF];
    float part[HALF];
#pragma unroll
    for (int i = 0; i < HALF; ++i) part[i] = above ? m[HALF + 1 + i] : m[i];
    return (above ? HALF + 1 : 0) + count_below(part, x);
  }
}

// Codes of the row into `codes`; the scale before it is rounded. Both halves of the warp run the
// same instructions, whichever bits they have: midpoints behind the last are infinite.
template <int HEAD_DIM, int TIER>
__device__ __forceinline__ float encode_row(const HeadRow<HEAD_DIM>& y, bool is_v,
                                            const Codebook& book, Levels levels, uint8_t* codes) {
  constexpr int K_BITS = k_bits_of(TIER), V_BITS = v_bits_of(TIER);
  constexpr int BITS = constexpr_max(K_BITS, V_BITS);
  static_assert((K_BITS == 8) == (V_BITS == 8));
  constexpr int ROWS = HEAD_DIM / HALF_WARP;
  const int lane = threadIdx.x % HALF_WARP;
  const bool gaussian = BITS < 8 && levels == Levels::GAUSSIAN;
  float sum = 0, top = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sum = __fadd_rn(sum, __fmul_rn(y.at[r], y.at[r]));
    top = max_or_nan(top, fabsf(y.at[r]));
  }
  sum = sum_lanes<HALF_WARP>(sum);
  const float mean = sum / static_cast<float>(HEAD_DIM);
  top = max_lanes<HALF_WARP>(top);
  const float unit = is_v ? gaussian_unit(V_BITS) : gaussian_unit(K_BITS);
  const int outermost = BITS == 8 ? 127 : (1 << (is_v ? V_BITS : K_BITS)) - 1;
  const float scale = gaussian ? __fmul_rn(sqrtf(mean), unit) : top / static_cast<float>(outermost);
  const float inverse = scale > 0 ? 1 / scale : 0.0f;
  float product = 0, square = 0;
  if constexpr (BITS == 8) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float x = fminf(fmaxf(__fmul_rn(y.at[r], inverse), -127.0f), 127.0f);
      codes[lane + HALF_WARP * r] = static_cast<uint8_t>(__float2int_rn(x) + 128);
    }
  } else {
    float midpoints[(1 << BITS) - 1];
#pragma unroll
    for (int i = 0; i < (1 << BITS) - 1; ++i) midpoints[i] = book.midpoint[i];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int code = count_below(midpoints, __fmul_rn(y.at[r], inverse));
      codes[lane + HALF_WARP * r] = static_cast<uint8_t>(code);
      const float level = book.level[code];
      product = __fadd_rn(product, __fmul_rn(y.at[r], level));
      square = __fadd_rn(square, __fmul_rn(level, level));
    }
    product = sum_lanes<HALF_WARP>(product);
    square = sum_lanes<HALF_WARP>(square);
  }
  if (!gaussian) return scale;
  // Least squares would shorten the row: keys keep their norm, values their product with
  // themselves.
  if (!is_v) return sqrtf(sum / square);
  return product == 0 ? 0.0f : sum / product;  // NaN stays
}

// The codes of one vector to their bytes in a page, four lanes of a plane at a time.
template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void pack_codes(uint8_t* section, int slot, const uint8_t* codes) {
  constexpr Planes PLANES = code_planes(BITS);
  const bool is_v = is_value_half();
  int low = 0;
#pragma unroll
  for (int p = 0; p < PLANES.count; ++p) {
    const int width = PLANES.width[p], lanes = plane_lanes(HEAD_DIM, width);
    const unsigned mask = 0x01010101u * ((1u << width) - 1);
    for (int group = threadIdx.x % HALF_WARP; group < lanes / 4; group += HALF_WARP) {
      unsigned word = 0;
      for (int shift = 0, c = 4 * group; shift < 8; shift += width, c += lanes) {
        const unsigned four = *reinterpret_cast<const unsigned*>(codes + c);
        word |= (four >> low & mask) << shift;
      }
      if (is_v) {
        uint8_t* const to = section + v_lane_offset(lanes, slot, 4 * group);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[4 * i] = static_cast<uint8_t>(word >> 8 * i);
      } else {
        *reinterpret_cast<unsigned*>(section + k_lane_offset(lanes, slot, 4 * group)) = word;
      }
    }
    section += PAGE_SIZE * lanes;
    low += width;
  }
}

template <int HEAD_DIM, int TIER>
__device__ __forceinline__ void write_codes(uint8_t* page, int slot, const TierBooks& books,
                                            Levels levels, const HeadRow<HEAD_DIM>& row,
                                            CodeScratch& scratch) {
  constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
  const bool is_v = is_value_half();
  uint8_t* const codes = scratch.codes[is_v];
  const int lane = threadIdx.x % HALF_WARP;
  __syncwarp();  // the record before this one is packed
  codes[HEAD_DIM + lane] = 0;
  const float scale =
      encode_row<HEAD_DIM, TIER>(row, is_v, is_v ? books.v : books.k, levels, codes);
  __syncwarp();
  uint8_t* const section = page + (is_v ? LAYOUT.v_codes : LAYOUT.k_codes);
  if (LAYOUT.k_bits == LAYOUT.v_bits || !is_v) {
    pack_codes<HEAD_DIM, LAYOUT.k_bits>(section, slot, codes);
  } else {
    pack_codes<HEAD_DIM, LAYOUT.v_bits>(section, slot, codes);
  }
  if (lane == 0) {
    __half* const scales =
        reinterpret_cast<__half*>(page + (is_v ? LAYOUT.v_scale : LAYOUT.k_scale));
    scales[slot] = __float2half_rn(scale > LARGEST_HALF ? LARGEST_HALF : scale);
  }
}

// Values of the model's dtype: this half's row (of the key or of the value) into a page.
template <int HEAD_DIM, int TIER>
__device__ __forceinline__ void write_row(uint8_t* page, int slot, const TierBooks& books,
                                          Levels levels, const char* values, DType dtype,
                                          const KeyShift& shift, int position,
                                          CodeScratch& scratch) {
  const bool is_v = is_value_half();
  const int lane = threadIdx.x % HALF_WARP;
  if constexpr (TIER == 16) {
    const int64_t section = int64_t{PAGE_SIZE} * HEAD_DIM * dtype_size(dtype);
    uint8_t* const to = page + (is_v ? section : 0);
    for (int c = lane; c < HEAD_DIM; c += HALF_WARP) {
      const int64_t at = int64_t{slot} * HEAD_DIM + c;
      if (dtype == DType::FLOAT32) {
        reinterpret_cast<float*>(to)[at] = reinterpret_cast<const float*>(values)[c];
      } else {
        reinterpret_cast<uint16_t*>(to)[at] = reinterpret_cast<const uint16_t*>(values)[c];
      }
    }
  } else {
    HeadRow<HEAD_DIM> row;
#pragma unroll
    for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
      const int c = lane + HALF_WARP * r;
      row.at[r] = load_value(values, dtype, c) - (is_v ? 0.0f : shift.mean[c]);
    }
    if (shift.turns > 0) turn_row<-1>(row, shift, position, !is_v);
    if (shift.weights != nullptr && !is_v) {
#pragma unroll
      for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
        row.at[r] = __fmul_rn(row.at[r], shift.weights[lane + HALF_WARP * r]);
      }
    }
    rotate(row, false);
    write_codes<HEAD_DIM, TIER>(page, slot, books, levels, row, scratch);
  }
}

template <int HEAD_DIM, int BITS>
__device__ __forceinline__ void read_section(const uint8_t* section, int slot, float scale,
                                             const Codebook& book, HeadRow<HEAD_DIM>& row) {
  constexpr Planes PLANES = code_planes(BITS);
  const bool is_v = is_value_half();
#pragma unroll
  for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
    const int c = static_cast<int>(threadIdx.x) % HALF_WARP + HALF_WARP * r;
    int code = 0, low = 0, start = 0;
#pragma unroll
    for (int p = 0; p < PLANES.count; ++p) {
      const int width = PLANES.width[p], lanes = plane_lanes(HEAD_DIM, width), j = c % lanes;
      const int at = start + (is_v ? v_lane_offset(lanes, slot, j) : k_lane_offset(lanes, slot, j));
      code |= (section[at] >> (c / lanes * width) & ((1 << width) - 1)) << low;
      start += PAGE_SIZE * lanes;
      low += width;
    }
    const float level = BITS == 8 ? static_cast<float>(code - 128) : book.level[code & 15];
    row.at[r] = __fmul_rn(level, scale);
  }
}

template <int HEAD_DIM, int TIER>
__device__ __forceinline__ HeadRow<HEAD_DIM> read_codes(const uint8_t* page, int slot,
                                                        const TierBooks& books) {
  constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
  const bool is_v = is_value_half();
  const __half* const scales =
      reinterpret_cast<const __half*>(page + (is_v ? LAYOUT.v_scale : LAYOUT.k_scale));
  const float scale = to_float(scales[slot]);
  const uint8_t* const section = page + (is_v ? LAYOUT.v_codes : LAYOUT.k_codes);
  const Codebook& book = is_v ? books.v : books.k;
  HeadRow<HEAD_DIM> row;
  if (LAYOUT.k_bits == LAYOUT.v_bits || !is_v) {
    read_section<HEAD_DIM, LAYOUT.k_bits>(section, slot, scale, book, row);
  } else {
    read_section<HEAD_DIM, LAYOUT.v_bits>(section, slot, scale, book, row);
  }
  return row;
}

__device__ __forceinline__ void write_label(uint8_t* page, const PageLayout& layout, int slot,
                                            int32_t position, uint16_t score) {
  reinterpret_cast<int32_t*>(page + layout.position)[slot] = position;
  reinterpret_cast<uint16_t*>(page + layout.score)[slot] = score;
}

// What the device holds is not checked by the host: a wrong length or page id must not lead out of
// the memory of the cache.
__device__ __forceinline__ int list_length(const PagedKV& cache, int64_t head, int tier) {
  if (cache.num_pages[tier] == 0) return 0;
  const int length = cache.cache_seqlens[head * cache.num_tiers + tier];
  return clamp_to(0, length, static_cast<int>(cache.max_pages) * PAGE_SIZE);
}

// The page of record i < max_pages * 64 of a list.
__device__ __forceinline__ uint8_t* page_of(const PagedKV& cache, int64_t head, int tier,
                                            int64_t i) {
  const int64_t entry = (head * cache.num_tiers + tier) * cache.max_pages + i / PAGE_SIZE;
  const int64_t last = cache.num_pages[tier] - 1;
  const int64_t id = clamp_to(int64_t{0}, cache.block_table[entry], last);
  return cache.pools[tier] + id * cache.page_bytes[tier];
}

}  // namespace smartkv

// Page format v2: where every byte of a page of 64 token records lies
// (docs/design/page-format.md). Twin of smartkv_ext/reference/layout.py; a test holds them equal.
#pragma once

#include <cstdint>

#include "smartkv/params.h"

namespace smartkv {

constexpr int PAGE_FORMAT_VERSION = 2;
// A tier is named by the bits of a value, or by 100 times those of keys plus those of values where
// the two differ: 302 is K3V2. Ascending: no step up takes bits from keys or from values.
constexpr int TIERS[] = {2, 302, 3, 403, 4, 8, 16};
constexpr int HEAD_DIMS[] = {64, 80, 96, 128, 256};
constexpr int MAX_HEAD_DIM = 256;

// Bits of keys and of values.
constexpr int k_bits_of(int tier) { return tier > 100 ? tier / 100 : tier; }
constexpr int v_bits_of(int tier) { return tier > 100 ? tier % 100 : tier; }
constexpr int bits_of_pair(int tier) { return k_bits_of(tier) + v_bits_of(tier); }

constexpr bool is_supported_tier(int64_t tier) {
  for (int t : TIERS) {
    if (t == tier) return true;
  }
  return false;
}

constexpr bool is_supported_head_dim(int head_dim) {
  for (int d : HEAD_DIMS) {
    if (d == head_dim) return true;
  }
  return false;
}

constexpr int dtype_size(DType dtype) { return dtype == DType::FLOAT32 ? 4 : 2; }

// Bit planes of a code, low bits first: a 3-bit code is two low bits and one high bit.
struct Planes {
  int count;
  int width[2];
};

constexpr Planes code_planes(int bits) {
  return bits == 3 ? Planes{2, {2, 1}} : Planes{1, {bits, 0}};
}

// Bytes that one record occupies in a plane of `width` bits, padded to whole 4-channel groups.
constexpr int plane_lanes(int head_dim, int width) { return (head_dim * width / 8 + 3) / 4 * 4; }

// Bytes of the K (or V) codes of one record.
constexpr int record_lanes(int bits, int head_dim) {
  const Planes planes = code_planes(bits);
  int lanes = 0;
  for (int i = 0; i < planes.count; ++i) lanes += plane_lanes(head_dim, planes.width[i]);
  return lanes;
}

// Offset of byte lane j of record s in a plane. K: blocks of 16 tokens, 4-channel groups inside.
constexpr int k_lane_offset(int lanes, int s, int j) {
  return s / 16 * (16 * lanes) + j / 4 * 64 + s % 16 * 4 + j % 4;
}

// V: quads of 4 tokens, channels inside.
constexpr int v_lane_offset(int lanes, int s, int j) { return s / 4 * (4 * lanes) + j * 4 + s % 4; }

// Byte offsets of the sections of one page. k_scale and v_scale are -1 in raw (16-bit) pages.
struct PageLayout {
  int tier;
  int k_bits, v_bits;
  int head_dim;
  int itemsize;  // bytes per value of the raw tier: 2 (bf16, fp16) or 4 (fp32)
  int64_t k_codes;
  int64_t v_codes;
  int64_t k_scale;   // float16 [64]
  int64_t v_scale;   // float16 [64]
  int64_t position;  // int32 [64], -1 in slots that were never written
  int64_t score;     // bfloat16 [64]
  int64_t page_bytes;

  constexpr bool is_raw() const { return k_bits == 16; }
};

constexpr PageLayout page_layout(int tier, int head_dim, int itemsize = 2) {
  PageLayout layout{};
  layout.tier = tier;
  layout.k_bits = k_bits_of(tier);
  layout.v_bits = v_bits_of(tier);
  layout.head_dim = head_dim;
  layout.itemsize = itemsize;
  const bool raw = layout.is_raw();
  const auto section = [&](int bits) {
    return int64_t{PAGE_SIZE} * (raw ? head_dim * itemsize : record_lanes(bits, head_dim));
  };
  const int64_t scales = raw ? 0 : PAGE_SIZE * 2;
  layout.k_codes = 0;
  layout.v_codes = section(layout.k_bits);
  const int64_t end = layout.v_codes + section(layout.v_bits);
  layout.k_scale = raw ? -1 : end;
  layout.v_scale = raw ? -1 : end + scales;
  layout.position = end + 2 * scales;
  layout.score = layout.position + PAGE_SIZE * 4;
  layout.page_bytes = layout.score + PAGE_SIZE * 2;
  return layout;
}

}  // namespace smartkv

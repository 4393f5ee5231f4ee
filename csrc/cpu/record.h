// Single records inside pages: writing, reading, copying. A byte never mixes records.
#pragma once

namespace smartkv::SMARTKV_ISA {

// How the lanes of one record lie in its plane: four K lanes together, V lanes four bytes apart.
template <bool IS_V>
SMARTKV_INLINE uint8_t* lane_at(uint8_t* plane, int lanes, int slot, int j) {
  return plane + (IS_V ? v_lane_offset(lanes, slot, j) : k_lane_offset(lanes, slot, j));
}
template <bool IS_V>
SMARTKV_INLINE const uint8_t* lane_at(const uint8_t* plane, int lanes, int slot, int j) {
  return plane + (IS_V ? v_lane_offset(lanes, slot, j) : k_lane_offset(lanes, slot, j));
}

// V lanes are byte slot % 4 of consecutive words: 16 of them, or the first `count`, go in and out
// of a vector at once. What is read or rewritten behind the last word lies in the same page.
SMARTKV_INLINE void put_v_lanes(uint8_t* words, int slot, I lanes, int count) {
  alignas(64) static constexpr int32_t INDEX[] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};
  const int shift = slot % 4 * 8;
  I mask = splat(static_cast<int32_t>(0xffu << shift));
  if (count < 16) mask = mask & gt(splat(count), load_words(INDEX));
  const I others = load_words(words) & (mask ^ splat(-1));
  store(reinterpret_cast<int32_t*>(words), others | ((lanes << shift) & mask));
}
SMARTKV_INLINE I get_v_lanes(const uint8_t* words, int slot) {
  return (load_words(words) >> (slot % 4 * 8)) & splat(255);
}

// Lanes j..j+15 of a record, fewer at the end of a plane, as integers in [0, 255]. Nothing wider
// than what is written is ever read back: the processor would wait until the stores have reached
// the cache.
template <bool IS_V>
SMARTKV_INLINE void put_lanes(uint8_t* plane, int lanes, int slot, int j, I words) {
  uint8_t* out = lane_at<IS_V>(plane, lanes, slot, j);
  if constexpr (IS_V) {
    put_v_lanes(out - slot % 4, slot, words, lanes - j);
  } else {
    alignas(16) uint8_t bytes[16];
    store_codes(bytes, words);
    for (int i = 0; i < 16 && j + i < lanes; i += 4) __builtin_memcpy(out + 16 * i, bytes + i, 4);
  }
}

template <bool IS_V>
SMARTKV_INLINE I get_lanes(const uint8_t* plane, int lanes, int slot, int j) {
  const uint8_t* in = lane_at<IS_V>(plane, lanes, slot, j);
  if constexpr (IS_V) {
    return get_v_lanes(in - slot % 4, slot);
  } else {
    int32_t four[4] = {};
    for (int i = 0; i < 4 && j + 4 * i < lanes; ++i) __builtin_memcpy(four + i, in + 64 * i, 4);
    return widen_bytes(v4i{four[0], four[1], four[2], four[3]});
  }
}

// Moves the lanes of a record, whatever they hold.
template <bool IS_V, int LANES>
SMARTKV_INLINE void copy_lanes(uint8_t* to_plane, int to_slot, const uint8_t* from_plane,
                               int from_slot) {
  uint8_t* to = lane_at<IS_V>(to_plane, LANES, to_slot, 0);
  const uint8_t* from = lane_at<IS_V>(from_plane, LANES, from_slot, 0);
  if constexpr (IS_V) {
    uint8_t* to_words = to - to_slot % 4;
    const uint8_t* from_words = from - from_slot % 4;
    for (int j = 0; j < LANES; j += 16) {
      const I lanes = get_v_lanes(from_words + 4 * j, from_slot);
      put_v_lanes(to_words + 4 * j, to_slot, lanes, LANES - j);
    }
  } else {
    for (int j = 0; j < LANES; j += 4) __builtin_memcpy(to + 16 * j, from + 16 * j, 4);
  }
}

// Calls body<HEAD_DIM>(): loops of known length, constant addresses.
template <class Body>
SMARTKV_INLINE void with_head_dim(int head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      return body.template operator()<64>();
    case 80:
      return body.template operator()<80>();
    case 96:
      return body.template operator()<96>();
    case 128:
      return body.template operator()<128>();
    default:
      return body.template operator()<256>();
  }
}

// Calls body<BITS>() for codes.
template <class Body>
SMARTKV_INLINE void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    default:
      return body.template operator()<8>();
  }
}

// Calls body<BITS, HEAD_DIM>() for a section of codes.
template <class Body>
SMARTKV_INLINE void with_section(int bits, int head_dim, const Body& body) {
  with_head_dim(head_dim, [&]<int HEAD_DIM>() {
    with_bits(bits, [&]<int BITS>() { body.template operator()<BITS, HEAD_DIM>(); });
  });
}

// Calls body<TIER, HEAD_DIM>() for a quantised page.
template <class Body>
SMARTKV_INLINE void with_format(int tier, int head_dim, const Body& body) {
  with_head_dim(head_dim, [&]<int HEAD_DIM>() {
    switch (tier) {
      case 2:
        return body.template operator()<2, HEAD_DIM>();
      case 302:
        return body.template operator()<302, HEAD_DIM>();
      case 3:
        return body.template operator()<3, HEAD_DIM>();
      case 403:
        return body.template operator()<403, HEAD_DIM>();
      case 4:
        return body.template operator()<4, HEAD_DIM>();
      default:
        return body.template operator()<8, HEAD_DIM>();
    }
  });
}

// Calls body<WIDTH, LOW>(section) for the planes of a section: WIDTH bits of each code, from LOW
// up.
template <int BITS, int HEAD_DIM, class Section, class Body>
SMARTKV_INLINE void each_plane(Section* section, const Body& body) {
  constexpr Planes PLANES = code_planes(BITS);
  body.template operator()<PLANES.width[0], 0>(section);
  if constexpr (PLANES.count == 2) {
    section += PAGE_SIZE * plane_lanes(HEAD_DIM, PLANES.width[0]);
    body.template operator()<PLANES.width[1], PLANES.width[0]>(section);
  }
}

template <bool IS_V, int BITS, int HEAD_DIM>
SMARTKV_INLINE void write_codes(uint8_t* section, int slot, const Codes& codes) {
  each_plane<BITS, HEAD_DIM>(section, [&]<int WIDTH, int LOW>(uint8_t* plane) {
    constexpr int LANES = plane_lanes(HEAD_DIM, WIDTH);
    const I mask = splat((1 << WIDTH) - 1);
    for (int j = 0; j < LANES; j += 16) {
      I words = splat(0);
      SMARTKV_UNROLL
      for (int part = 0; part < 8 / WIDTH; ++part) {
        const I code = load_bytes(codes.at + j + part * LANES);
        words = words | (((code >> LOW) & mask) << (part * WIDTH));
      }
      put_lanes<IS_V>(plane, LANES, slot, j, words);
    }
  });
}

template <bool IS_V, int BITS, int HEAD_DIM>
SMARTKV_INLINE void read_codes(const uint8_t* section, int slot, Codes& codes) {
  each_plane<BITS, HEAD_DIM>(section, [&]<int WIDTH, int LOW>(const uint8_t* plane) {
    constexpr int LANES = plane_lanes(HEAD_DIM, WIDTH);
    const I mask = splat((1 << WIDTH) - 1), below = splat((1 << LOW) - 1);
    I words[(LANES + 15) / 16];
    for (int j = 0; j < LANES; j += 16) words[j / 16] = get_lanes<IS_V>(plane, LANES, slot, j);
    // Ascending: what a vector writes past its lanes is overwritten by the next ones.
    SMARTKV_UNROLL
    for (int part = 0; part < 8 / WIDTH; ++part) {
      for (int j = 0; j < LANES; j += 16) {
        uint8_t* at = codes.at + part * LANES + j;
        const I bits = ((words[j / 16] >> (part * WIDTH)) & mask) << LOW;
        store_codes(at, LOW == 0 ? bits : (load_bytes(at) & below) | bits);
      }
    }
  });
}

template <bool IS_V, int BITS, int HEAD_DIM>
SMARTKV_INLINE void copy_codes(uint8_t* to, int to_slot, const uint8_t* from, int from_slot) {
  each_plane<BITS, HEAD_DIM>(to, [&]<int WIDTH, int>(uint8_t* plane) {
    copy_lanes<IS_V, plane_lanes(HEAD_DIM, WIDTH)>(plane, to_slot, from + (plane - to), from_slot);
  });
}

template <class T>
SMARTKV_INLINE void put(uint8_t* section, int slot, T value) {
  __builtin_memcpy(section + slot * sizeof value, &value, sizeof value);
}
template <class T>
SMARTKV_INLINE T get(const uint8_t* section, int slot) {
  T value;
  __builtin_memcpy(&value, section + slot * sizeof value, sizeof value);
  return value;
}

// A place for one record.
struct Slot {
  uint8_t* page;
  int index;
};

// Moves a record between pages of one tier.
inline void copy_record(const PageLayout& layout, Slot to, Slot from) {
  if (layout.is_raw()) {
    const int64_t row = int64_t{layout.head_dim} * layout.itemsize;
    uint8_t* into = to.page + to.index * row;
    const uint8_t* out_of = from.page + from.index * row;
    __builtin_memcpy(into + layout.k_codes, out_of + layout.k_codes, row);
    __builtin_memcpy(into + layout.v_codes, out_of + layout.v_codes, row);
  } else {
    with_format(layout.tier, layout.head_dim, [&]<int TIER, int HEAD_DIM>() {
      constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
      copy_codes<false, LAYOUT.k_bits, HEAD_DIM>(to.page + LAYOUT.k_codes, to.index,
                                                 from.page + LAYOUT.k_codes, from.index);
      copy_codes<true, LAYOUT.v_bits, HEAD_DIM>(to.page + LAYOUT.v_codes, to.index,
                                                from.page + LAYOUT.v_codes, from.index);
      put(to.page + LAYOUT.k_scale, to.index,
          get<uint16_t>(from.page + LAYOUT.k_scale, from.index));
      put(to.page + LAYOUT.v_scale, to.index,
          get<uint16_t>(from.page + LAYOUT.v_scale, from.index));
    });
  }
  put(to.page + layout.position, to.index, get<int32_t>(from.page + layout.position, from.index));
  put(to.page + layout.score, to.index, get<uint16_t>(from.page + layout.score, from.index));
}

// Encodes rotated vectors into a slot; position and score are left to the caller.
inline void write_rotated(const PageLayout& layout, const Encoder& encoder, Slot slot,
                          const float* k, const float* v) {
  with_format(layout.tier, layout.head_dim, [&]<int TIER, int HEAD_DIM>() {
    constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
    TokenCodes codes;
    encode<LAYOUT.k_bits, LAYOUT.v_bits, HEAD_DIM>(encoder, {{k, v}}, codes);
    write_codes<false, LAYOUT.k_bits, HEAD_DIM>(slot.page + LAYOUT.k_codes, slot.index,
                                                codes.at[0]);
    write_codes<true, LAYOUT.v_bits, HEAD_DIM>(slot.page + LAYOUT.v_codes, slot.index, codes.at[1]);
    put(slot.page + LAYOUT.k_scale, slot.index, stored_scale(codes.scale[0]));
    put(slot.page + LAYOUT.v_scale, slot.index, stored_scale(codes.scale[1]));
  });
}

// Writes K and V rows of the model's dtype into a slot of a raw or quantised page.
inline void write_rows(const PageLayout& layout, const Encoder& encoder, Slot slot, DType dtype,
                       const char* k, const char* v, const KeyShift& shift, int32_t position) {
  const int head_dim = layout.head_dim;
  if (layout.is_raw()) {
    const int64_t row = int64_t{head_dim} * layout.itemsize;
    __builtin_memcpy(slot.page + layout.k_codes + slot.index * row, k, row);
    __builtin_memcpy(slot.page + layout.v_codes + slot.index * row, v, row);
    return;
  }
  alignas(64) float k_row[MAX_HEAD_DIM], v_row[MAX_HEAD_DIM];
  load_row(k_row, k, dtype, head_dim);
  load_row(v_row, v, dtype, head_dim);
  for (int c = 0; c < head_dim; c += 16) store(k_row + c, load(k_row + c) - load(shift.mean + c));
  if (shift.turns > 0) turn_row<-1>(k_row, shift, position, head_dim);
  if (shift.weights != nullptr) multiply_row(k_row, shift.weights, head_dim);
  rotate(k_row, head_dim);
  rotate(v_row, head_dim);
  write_rotated(layout, encoder, slot, k_row, v_row);
}

// Rotated vectors of a quantised record.
inline void read_rotated(const PageLayout& layout, const Encoder& encoder, Slot slot, float* k,
                         float* v) {
  with_format(layout.tier, layout.head_dim, [&]<int TIER, int HEAD_DIM>() {
    constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
    Codes codes;
    read_codes<false, LAYOUT.k_bits, HEAD_DIM>(slot.page + LAYOUT.k_codes, slot.index, codes);
    const auto k_scale = get<uint16_t>(slot.page + LAYOUT.k_scale, slot.index);
    decode<LAYOUT.k_bits, HEAD_DIM>(encoder.k, codes, k_scale, k);
    read_codes<true, LAYOUT.v_bits, HEAD_DIM>(slot.page + LAYOUT.v_codes, slot.index, codes);
    const auto v_scale = get<uint16_t>(slot.page + LAYOUT.v_scale, slot.index);
    decode<LAYOUT.v_bits, HEAD_DIM>(encoder.v, codes, v_scale, v);
  });
}

// A demotion that leaves the bits of keys (values) alone leaves them as they are.
inline void copy_equal_codes(const PageLayout& target, Slot to, const PageLayout& source,
                             Slot from) {
  const auto copy = [&]<bool IS_V>(int bits, int64_t into, int64_t out_of, int64_t to_scale,
                                   int64_t from_scale) {
    with_section(bits, target.head_dim, [&]<int BITS, int HEAD_DIM>() {
      copy_codes<IS_V, BITS, HEAD_DIM>(to.page + into, to.index, from.page + out_of, from.index);
    });
    put(to.page + to_scale, to.index, get<uint16_t>(from.page + from_scale, from.index));
  };
  if (target.k_bits == source.k_bits) {
    copy.template operator()<false>(target.k_bits, target.k_codes, source.k_codes, target.k_scale,
                                    source.k_scale);
  }
  if (target.v_bits == source.v_bits) {
    copy.template operator()<true>(target.v_bits, target.v_codes, source.v_codes, target.v_scale,
                                   source.v_scale);
  }
}

inline void write_label(const PageLayout& layout, Slot slot, int32_t position, uint16_t score) {
  put(slot.page + layout.position, slot.index, position);
  put(slot.page + layout.score, slot.index, score);
}

}  // namespace smartkv::SMARTKV_ISA

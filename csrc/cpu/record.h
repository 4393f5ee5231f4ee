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

// V lanes are byte slot % 4 of consecutive words: 16 of them go in and out of a vector at once.
SMARTKV_INLINE void put_v_lanes(uint8_t* words, int slot, I lanes) {
  const int shift = slot % 4 * 8;
  const I mask = splat(static_cast<int32_t>(0xffu << shift));
  const I others = load_words(words) & (mask ^ splat(-1));
  store(reinterpret_cast<int32_t*>(words), others | (lanes << shift));
}
SMARTKV_INLINE I get_v_lanes(const uint8_t* words, int slot) {
  return (load_words(words) >> (slot % 4 * 8)) & splat(255);
}

template <bool IS_V>
inline void scatter_lanes(uint8_t* plane, int lanes, int slot, const uint8_t* bytes) {
  uint8_t* out = lane_at<IS_V>(plane, lanes, slot, 0);
  if constexpr (IS_V) {
    uint8_t* words = out - slot % 4;
    int j = 0;
    for (; j + 16 <= lanes; j += 16) put_v_lanes(words + 4 * j, slot, load_bytes(bytes + j));
    for (; j < lanes; ++j) out[4 * j] = bytes[j];
  } else {
    for (int j = 0; j < lanes; j += 4) __builtin_memcpy(out + 16 * j, bytes + j, 4);
  }
}

template <bool IS_V>
inline void gather_lanes(const uint8_t* plane, int lanes, int slot, uint8_t* bytes) {
  const uint8_t* in = lane_at<IS_V>(plane, lanes, slot, 0);
  if constexpr (IS_V) {
    const uint8_t* words = in - slot % 4;
    int j = 0;
    for (; j + 16 <= lanes; j += 16) store_codes(bytes + j, get_v_lanes(words + 4 * j, slot));
    for (; j < lanes; ++j) bytes[j] = in[4 * j];
  } else {
    for (int j = 0; j < lanes; j += 4) __builtin_memcpy(bytes + j, in + 16 * j, 4);
  }
}

template <bool IS_V>
inline void copy_lanes(uint8_t* to_plane, int to_slot, const uint8_t* from_plane, int from_slot,
                       int lanes) {
  uint8_t* to = lane_at<IS_V>(to_plane, lanes, to_slot, 0);
  const uint8_t* from = lane_at<IS_V>(from_plane, lanes, from_slot, 0);
  if constexpr (IS_V) {
    uint8_t* to_words = to - to_slot % 4;
    const uint8_t* from_words = from - from_slot % 4;
    int j = 0;
    for (; j + 16 <= lanes; j += 16) {
      put_v_lanes(to_words + 4 * j, to_slot, get_v_lanes(from_words + 4 * j, from_slot));
    }
    for (; j < lanes; ++j) to[4 * j] = from[4 * j];
  } else {
    for (int j = 0; j < lanes; j += 4) __builtin_memcpy(to + 16 * j, from + 16 * j, 4);
  }
}

// Bytes of 64 lanes at a time; what runs past the lanes is not used.
constexpr int32_t repeat_byte(int byte) { return static_cast<int32_t>(byte * 0x01010101u); }

// One plane of `width` bits: bit `low` of a code upwards goes to (comes from) the plane.
template <bool IS_V>
inline void write_plane(uint8_t* plane, int slot, int head_dim, int width, int low,
                        const Codes& codes) {
  const int lanes = plane_lanes(head_dim, width);
  const I mask = splat(repeat_byte((1 << width) - 1));
  alignas(64) uint8_t bytes[MAX_HEAD_DIM];
  for (int j = 0; j < lanes; j += 64) {
    I word = splat(0);
    for (int shift = 0, c = j; shift < 8; shift += width, c += lanes) {
      word = word | (((load_words(codes.at + c) >> low) & mask) << shift);
    }
    store(reinterpret_cast<int32_t*>(bytes + j), word);
  }
  scatter_lanes<IS_V>(plane, lanes, slot, bytes);
}

template <bool IS_V>
inline void read_plane(const uint8_t* plane, int slot, int head_dim, int width, int low,
                       Codes& codes) {
  const int lanes = plane_lanes(head_dim, width);
  const I mask = splat(repeat_byte((1 << width) - 1));
  alignas(64) uint8_t bytes[MAX_HEAD_DIM];
  gather_lanes<IS_V>(plane, lanes, slot, bytes);
  const I below = splat(repeat_byte((1 << low) - 1));
  // Ascending: what a vector writes past its lanes is overwritten by the next ones.
  for (int shift = 0, c = 0; shift < 8; shift += width, c += lanes) {
    for (int j = 0; j < lanes; j += 64) {
      const I part = ((load_words(bytes + j) >> shift) & mask) << low;
      auto* at = reinterpret_cast<int32_t*>(codes.at + c + j);
      store(at, (load_words(at) & below) | part);
    }
  }
}

template <bool IS_V>
inline void write_codes(uint8_t* section, int slot, int bits, int head_dim, const Codes& codes) {
  const Planes planes = code_planes(bits);
  for (int i = 0, low = 0; i < planes.count; low += planes.width[i++]) {
    write_plane<IS_V>(section, slot, head_dim, planes.width[i], low, codes);
    section += PAGE_SIZE * plane_lanes(head_dim, planes.width[i]);
  }
}

template <bool IS_V>
inline void read_codes(const uint8_t* section, int slot, int bits, int head_dim, Codes& codes) {
  const Planes planes = code_planes(bits);
  for (int i = 0, low = 0; i < planes.count; low += planes.width[i++]) {
    read_plane<IS_V>(section, slot, head_dim, planes.width[i], low, codes);
    section += PAGE_SIZE * plane_lanes(head_dim, planes.width[i]);
  }
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
  const int64_t row = int64_t{layout.head_dim} * layout.itemsize;
  for (int kind = 0; kind < 2; ++kind) {
    int64_t start = kind == 0 ? layout.k_codes : layout.v_codes;
    if (layout.bits == 16) {
      __builtin_memcpy(to.page + start + to.index * row, from.page + start + from.index * row, row);
      continue;
    }
    const Planes planes = code_planes(layout.bits);
    for (int i = 0; i < planes.count; ++i) {
      const int lanes = plane_lanes(layout.head_dim, planes.width[i]);
      if (kind == 0) {
        copy_lanes<false>(to.page + start, to.index, from.page + start, from.index, lanes);
      } else {
        copy_lanes<true>(to.page + start, to.index, from.page + start, from.index, lanes);
      }
      start += PAGE_SIZE * lanes;
    }
    const int64_t scale = kind == 0 ? layout.k_scale : layout.v_scale;
    put(to.page + scale, to.index, get<uint16_t>(from.page + scale, from.index));
  }
  put(to.page + layout.position, to.index, get<int32_t>(from.page + layout.position, from.index));
  put(to.page + layout.score, to.index, get<uint16_t>(from.page + layout.score, from.index));
}

// Encodes rotated vectors into a slot; position and score are left to the caller.
inline void write_rotated(const PageLayout& layout, const Encoder& encoder, Slot slot,
                          const float* k, const float* v) {
  Codes codes;
  const uint16_t k_scale = encode(encoder, k, codes);
  write_codes<false>(slot.page + layout.k_codes, slot.index, layout.bits, layout.head_dim, codes);
  const uint16_t v_scale = encode(encoder, v, codes);
  write_codes<true>(slot.page + layout.v_codes, slot.index, layout.bits, layout.head_dim, codes);
  put(slot.page + layout.k_scale, slot.index, k_scale);
  put(slot.page + layout.v_scale, slot.index, v_scale);
}

// Writes K and V rows of the model's dtype into a slot of a raw or quantised page.
inline void write_rows(const PageLayout& layout, const Encoder& encoder, Slot slot, DType dtype,
                       const char* k, const char* v, const float* k_mean) {
  const int head_dim = layout.head_dim;
  if (layout.bits == 16) {
    const int64_t row = int64_t{head_dim} * layout.itemsize;
    __builtin_memcpy(slot.page + layout.k_codes + slot.index * row, k, row);
    __builtin_memcpy(slot.page + layout.v_codes + slot.index * row, v, row);
    return;
  }
  alignas(64) float k_row[MAX_HEAD_DIM], v_row[MAX_HEAD_DIM];
  load_row(k_row, k, dtype, head_dim);
  load_row(v_row, v, dtype, head_dim);
  for (int c = 0; c < head_dim; c += 16) store(k_row + c, load(k_row + c) - load(k_mean + c));
  rotate(k_row, head_dim);
  rotate(v_row, head_dim);
  write_rotated(layout, encoder, slot, k_row, v_row);
}

// Rotated vectors of a quantised record.
inline void read_rotated(const PageLayout& layout, const Encoder& encoder, Slot slot, float* k,
                         float* v) {
  Codes codes;
  read_codes<false>(slot.page + layout.k_codes, slot.index, layout.bits, layout.head_dim, codes);
  decode(encoder, codes, get<uint16_t>(slot.page + layout.k_scale, slot.index), k);
  read_codes<true>(slot.page + layout.v_codes, slot.index, layout.bits, layout.head_dim, codes);
  decode(encoder, codes, get<uint16_t>(slot.page + layout.v_scale, slot.index), v);
}

inline void write_label(const PageLayout& layout, Slot slot, int32_t position, uint16_t score) {
  put(slot.page + layout.position, slot.index, position);
  put(slot.page + layout.score, slot.index, score);
}

}  // namespace smartkv::SMARTKV_ISA

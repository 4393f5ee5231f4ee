// Tiles of 64 tokens decoded once into fp32: K as [head_dim][64 tokens], V as [64 tokens][stride].
// Quantised tiles hold levels (no scale) of the rotated space.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Lanes that are no multiple of 16 make a vector run up to 12 floats past a V row.
constexpr int v_stride(int head_dim) { return head_dim + 16; }
constexpr int64_t tile_floats(int head_dim) { return int64_t{PAGE_SIZE} * v_stride(head_dim); }

template <int WIDTH>
inline void decode_k_plane(float* out, const uint8_t* codes, int head_dim, const Lookup& level) {
  const int lanes = plane_lanes(head_dim, WIDTH);
  for (int block = 0; block < 4; ++block) {
    for (int j = 0; j < lanes; j += 4) {
      const I word = load_words(codes + block * 16 * lanes + j * 16);
      float* to = out + j * PAGE_SIZE + block * 16;
      SMARTKV_UNROLL
      for (int u = 0; u < 8 / WIDTH; ++u) {
        SMARTKV_UNROLL
        for (int i = 0; i < 4; ++i) {
          store(to + (u * lanes + i) * PAGE_SIZE, level(word >> (8 * i + WIDTH * u)));
        }
      }
    }
  }
}

// Low two bits from one plane's word, the third from the other's; higher bits are noise.
SMARTKV_INLINE I join_3bit(I low, I high) { return (low & splat(3)) | ((high << 2) & splat(4)); }

inline void decode_k_3bit(float* out, const uint8_t* codes, int head_dim, const Lookup& level) {
  const int low_lanes = plane_lanes(head_dim, 2), high_lanes = plane_lanes(head_dim, 1);
  const uint8_t* high_codes = codes + PAGE_SIZE * low_lanes;
  for (int block = 0; block < 4; ++block) {
    for (int c = 0; c < head_dim; c += 4) {
      const int j = c % low_lanes, k = c % high_lanes;
      const I low = load_words(codes + block * 16 * low_lanes + j * 16) >> (c / low_lanes * 2);
      const I high = load_words(high_codes + block * 16 * high_lanes + k * 16) >> (c / high_lanes);
      SMARTKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const I code = join_3bit(low >> (8 * i), high >> (8 * i));
        store(out + (c + i) * PAGE_SIZE + block * 16, level(code));
      }
    }
  }
}

SMARTKV_INLINE F level_8bit(I word, int shift) {
  return to_float((word >> shift) & splat(255)) - splat(128.0f);
}

inline void decode_k_8bit(float* out, const uint8_t* codes, int head_dim) {
  for (int block = 0; block < 4; ++block) {
    for (int c = 0; c < head_dim; c += 4) {
      const I word = load_words(codes + block * 16 * head_dim + c * 16);
      SMARTKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        store(out + (c + i) * PAGE_SIZE + block * 16, level_8bit(word, 8 * i));
      }
    }
  }
}

// Lanes beyond a plane's width spill into the channels that the next u overwrites.
template <int WIDTH>
inline void decode_v_plane(float* out, const uint8_t* codes, int head_dim, const Lookup& level) {
  const int lanes = plane_lanes(head_dim, WIDTH), stride = v_stride(head_dim);
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad, codes += 4 * lanes, out += 4 * stride) {
    SMARTKV_UNROLL
    for (int u = 0; u < 8 / WIDTH; ++u) {
      for (int j = 0; j < lanes; j += 16) {
        const I word = load_words(codes + 4 * j) >> (WIDTH * u);
        SMARTKV_UNROLL
        for (int i = 0; i < 4; ++i) {
          store(out + i * stride + u * lanes + j, level(word >> (8 * i)));
        }
      }
    }
  }
}

// 3-bit V of one quad where both planes have whole vectors of lanes.
inline void decode_v_3bit_aligned(float* out, const uint8_t* low_codes, const uint8_t* high_codes,
                                  int head_dim, const Lookup& level) {
  const int low_lanes = plane_lanes(head_dim, 2), high_lanes = plane_lanes(head_dim, 1);
  for (int c = 0; c < head_dim; c += 16) {
    const I low = load_words(low_codes + c % low_lanes * 4) >> (c / low_lanes * 2);
    const I high = load_words(high_codes + c % high_lanes * 4) >> (c / high_lanes);
    SMARTKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      store(out + i * v_stride(head_dim) + c, level(join_3bit(low >> (8 * i), high >> (8 * i))));
    }
  }
}

// Words of a quad, shifted so that byte i is the code (with noise above) of token i.
inline void spread_plane(int32_t* words, const uint8_t* codes, int head_dim, int width) {
  const int lanes = plane_lanes(head_dim, width);
  for (int u = 0, c = 0; c < head_dim; ++u, c += lanes) {
    for (int j = 0; j < lanes; j += 16) {
      store(words + c + j, load_words(codes + 4 * j) >> (width * u));
    }
  }
}

inline void decode_v_3bit(float* out, const uint8_t* codes, int head_dim, const Lookup& level) {
  const int low_lanes = plane_lanes(head_dim, 2), high_lanes = plane_lanes(head_dim, 1);
  const uint8_t* high_codes = codes + PAGE_SIZE * low_lanes;
  const int stride = v_stride(head_dim);
  alignas(64) int32_t low[MAX_HEAD_DIM + 32], high[MAX_HEAD_DIM + 32];
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad, out += 4 * stride) {
    const uint8_t* low_quad = codes + quad * 4 * low_lanes;
    const uint8_t* high_quad = high_codes + quad * 4 * high_lanes;
    if (high_lanes % 16 == 0) {
      decode_v_3bit_aligned(out, low_quad, high_quad, head_dim, level);
      continue;
    }
    spread_plane(low, low_quad, head_dim, 2);
    spread_plane(high, high_quad, head_dim, 1);
    for (int c = 0; c < head_dim; c += 16) {
      const I low_word = load_words(low + c), high_word = load_words(high + c);
      SMARTKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const I code = join_3bit(low_word >> (8 * i), high_word >> (8 * i));
        store(out + i * stride + c, level(code));
      }
    }
  }
}

inline void decode_v_8bit(float* out, const uint8_t* codes, int head_dim) {
  const int stride = v_stride(head_dim);
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad, out += 4 * stride) {
    for (int c = 0; c < head_dim; c += 16) {
      const I word = load_words(codes + quad * 4 * head_dim + 4 * c);
      SMARTKV_UNROLL
      for (int i = 0; i < 4; ++i) store(out + i * stride + c, level_8bit(word, 8 * i));
    }
  }
}

inline void decode_k_tile(float* out, const uint8_t* codes, int bits, int head_dim,
                          const Lookup& level) {
  switch (bits) {
    case 2:
      return decode_k_plane<2>(out, codes, head_dim, level);
    case 3:
      return decode_k_3bit(out, codes, head_dim, level);
    case 4:
      return decode_k_plane<4>(out, codes, head_dim, level);
    default:
      return decode_k_8bit(out, codes, head_dim);
  }
}

inline void decode_v_tile(float* out, const uint8_t* codes, int bits, int head_dim,
                          const Lookup& level) {
  switch (bits) {
    case 2:
      return decode_v_plane<2>(out, codes, head_dim, level);
    case 3:
      return decode_v_3bit(out, codes, head_dim, level);
    case 4:
      return decode_v_plane<4>(out, codes, head_dim, level);
    default:
      return decode_v_8bit(out, codes, head_dim);
  }
}

// ---- tiles of plain rows ----

// Up to 64 rows of one dtype.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride;  // bytes
  int count;
};

template <int H, class V, int... LANE>
SMARTKV_INLINE void exchange_lanes(V& a, V& b, Lanes<LANE...>) {
  constexpr int N = sizeof...(LANE);
  typedef decltype(as_int(a)) INTS;
  const V low = SMARTKV_SHUFFLE(a, b, INTS, (LANE & H ? N + LANE - H : LANE)...);
  b = SMARTKV_SHUFFLE(a, b, INTS, (LANE & H ? N + LANE : LANE + H)...);
  a = low;
}
// One step of a transposition: swaps the upper lanes of a with the lower lanes of b.
template <int H, class V>
SMARTKV_INLINE void exchange(V& a, V& b) {
  exchange_lanes<H>(a, b, lanes_of(a));
}
template <int H, class V>
SMARTKV_INLINE void exchange(Pair<V>& a, Pair<V>& b) {
  if constexpr (sizeof(V) == H * sizeof(float)) {
    const V upper = a.hi;
    a.hi = b.lo;
    b.lo = upper;
  } else {
    exchange<H>(a.lo, b.lo);
    exchange<H>(a.hi, b.hi);
  }
}

template <int H>
SMARTKV_INLINE void exchange_rows(F (&x)[16]) {
  SMARTKV_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (!(i & H)) exchange<H>(x[i], x[i + H]);
  }
}

// Rows [count][head_dim] -> [head_dim][64]; columns past count hold copies of the last row.
inline void load_transposed(float* out, const Rows& rows, int head_dim) {
  with_dtype(rows.dtype, [&]<DType DTYPE>() {
    for (int token = 0; token < rows.count; token += 16) {
      for (int c = 0; c < head_dim; c += 16) {
        F x[16];
        SMARTKV_UNROLL
        for (int i = 0; i < 16; ++i) {
          const int n = token + i < rows.count ? token + i : rows.count - 1;
          x[i] = load_values<DTYPE>(rows.data + n * rows.stride, c);
        }
        exchange_rows<1>(x);
        exchange_rows<2>(x);
        exchange_rows<4>(x);
        exchange_rows<8>(x);
        SMARTKV_UNROLL
        for (int i = 0; i < 16; ++i) store(out + (c + i) * PAGE_SIZE + token, x[i]);
      }
    }
    // The rest is multiplied and dropped: any finite or stale value will do.
  });
}

// Rows that `visible` leaves out become zeros: they may hold NaN.
inline void load_visible(float* out, const Rows& rows, int head_dim, uint64_t visible) {
  const int stride = v_stride(head_dim);
  for (int n = 0; n < PAGE_SIZE; ++n, out += stride) {
    if (visible >> n & 1) {
      load_row(out, rows.data + n * rows.stride, rows.dtype, head_dim);
    } else {
      __builtin_memset(out, 0, head_dim * sizeof(float));
    }
  }
}

}  // namespace smartkv::SMARTKV_ISA

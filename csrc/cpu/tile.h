// Tiles of 64 tokens decoded once into fp32: K as [head_dim][64 tokens], V as [64 tokens][stride].
// Quantised tiles hold levels (no scale) of the rotated space.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Rows of a power of two bytes would fall into few cache sets.
constexpr int v_stride(int head_dim) { return head_dim + 16; }
constexpr int64_t tile_floats(int head_dim) { return int64_t{PAGE_SIZE} * v_stride(head_dim); }

// Every channel of K, 16 tokens at a time, in channel order.
template <int BITS>
inline void decode_k_fixed(float* out, const uint8_t* codes, const SectionCodec& codec) {
  const CodeReader<BITS> reader(codec);
  for (int block = 0; block < 4; ++block) {
    for (int c = 0; c < codec.head_dim; c += 4) {
      const I word = reader.k_word(codes, c, block);
      float* to = out + c * PAGE_SIZE + block * 16;
      store(to, reader.template level<0>(word));
      store(to + PAGE_SIZE, reader.template level<1>(word));
      store(to + 2 * PAGE_SIZE, reader.template level<2>(word));
      store(to + 3 * PAGE_SIZE, reader.template level<3>(word));
    }
  }
}

template <int BITS>
inline void decode_v_fixed(float* out, const uint8_t* codes, const SectionCodec& codec) {
  const CodeReader<BITS> reader(codec);
  const int stride = v_stride(codec.head_dim);
  alignas(64) int32_t words[2][MAX_HEAD_DIM + 32];
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad, out += 4 * stride) {
    if (!codec.has_aligned_v) codec.spread_v_words(codes, quad, words);
    for (int c = 0; c < codec.head_dim; c += 16) {
      const I word =
          codec.has_aligned_v
              ? reader.v_word(codes, c, quad)
              : reader.map(reader.merge(load_words(words[0] + c), load_words(words[1] + c)));
      store(out + c, reader.template level<0>(word));
      store(out + stride + c, reader.template level<1>(word));
      store(out + 2 * stride + c, reader.template level<2>(word));
      store(out + 3 * stride + c, reader.template level<3>(word));
    }
  }
}

inline void decode_k_tile(float* out, const uint8_t* codes, const SectionCodec& codec) {
  switch (codec.bits) {
    case 2:
      return decode_k_fixed<2>(out, codes, codec);
    case 3:
      return decode_k_fixed<3>(out, codes, codec);
    case 4:
      return decode_k_fixed<4>(out, codes, codec);
    default:
      return decode_k_fixed<8>(out, codes, codec);
  }
}

inline void decode_v_tile(float* out, const uint8_t* codes, const SectionCodec& codec) {
  switch (codec.bits) {
    case 2:
      return decode_v_fixed<2>(out, codes, codec);
    case 3:
      return decode_v_fixed<3>(out, codes, codec);
    case 4:
      return decode_v_fixed<4>(out, codes, codec);
    default:
      return decode_v_fixed<8>(out, codes, codec);
  }
}

// ---- tiles of plain rows ----

// Up to 64 rows of one dtype.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride;  // bytes
  int count;
  int64_t
      ahead;  // bytes to the same row of the next tile, fetched meanwhile; 0 where a Feed does it
};

// Steps of a walk over rows of K or V: one for each line.
SMARTKV_INLINE int row_steps(const Rows& rows, int head_dim) {
  return rows.count * ((head_dim * dtype_size(rows.dtype) + 63) / 64);
}
SMARTKV_INLINE void fetch_row(const Rows& rows, Lines& fetch, const char* line) {
  if (rows.ahead != 0) __builtin_prefetch(line + rows.ahead);
  fetch.step();
}

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
inline void load_transposed(float* out, const Rows& rows, Lines fetch, int head_dim) {
  with_dtype(rows.dtype, [&]<DType DTYPE>() {
    for (int token = 0; token < rows.count; token += 16) {
      for (int c = 0; c < head_dim; c += 16) {
        F x[16];
        SMARTKV_UNROLL
        for (int i = 0; i < 16; ++i) {
          const int n = token + i < rows.count ? token + i : rows.count - 1;
          const char* at = rows.data + n * rows.stride + c * dtype_size(DTYPE);
          if (c * dtype_size(DTYPE) % 64 == 0) fetch_row(rows, fetch, at);
          x[i] = load_values<DTYPE>(at, 0);
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
inline void load_visible(float* out, const Rows& rows, Lines fetch, int head_dim,
                         uint64_t visible) {
  const int stride = v_stride(head_dim);
  for (int n = 0; n < PAGE_SIZE; ++n, out += stride) {
    if (visible >> n & 1) {
      const char* row = rows.data + n * rows.stride;
      for (int i = 0; i < head_dim * dtype_size(rows.dtype); i += 64)
        fetch_row(rows, fetch, row + i);
      load_row(out, row, rows.dtype, head_dim);
    } else {
      __builtin_memset(out, 0, head_dim * sizeof(float));
    }
  }
}

}  // namespace smartkv::SMARTKV_ISA

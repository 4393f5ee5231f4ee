// Products of few query rows with packed codes, without a decoded tile in between: what a decode
// step does. Many rows use the decoded tile instead, where decoding is paid once.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Up to this many rows, in blocks of four, decoding again per block beats writing the tile.
#if defined(SMARTKV_AVX512)
constexpr int FUSED_ROWS = 16, FUSED_VECS = 4;
#elif defined(SMARTKV_AVX2)
constexpr int FUSED_ROWS = 12, FUSED_VECS = 1;
#else
constexpr int FUSED_ROWS = 0, FUSED_VECS = 1;
#endif
constexpr int FUSED_BLOCK = 4;

template <int ROWS, int VECS>
SMARTKV_INLINE void multiply_add(F (&sum)[ROWS][VECS], const F (&x)[VECS], const float* y,
                                 int64_t stride) {
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const F factor = splat(y[r * stride]);
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) sum[r][v] = fma(factor, x[v], sum[r][v]);
  }
}

template <int BITS, int INDEX, int VECS>
SMARTKV_INLINE void levels_of(const CodeReader<BITS>& reader, const I (&words)[VECS],
                              F (&x)[VECS]) {
  SMARTKV_UNROLL
  for (int v = 0; v < VECS; ++v) x[v] = reader.template level<INDEX>(words[v]);
}

// Packed codes, and what is fetched in step with the arithmetic on them.
struct CodeStream {
  const uint8_t* codes;
  Lines fetch;
};

template <int BITS>
SMARTKV_INLINE void fetch_step(Lines& lines) {
  SMARTKV_UNROLL
  for (int i = 0; i < (BITS + 1) / 2; ++i) lines.step();
}

// scores[r][t] = sum over c of q[r][c] K[c][t].
template <int BITS, int ROWS>
inline void multiply_k(const SectionCodec& codec, CodeStream stream, const float* q,
                       float* scores) {
  constexpr int VECS = FUSED_VECS;
  const CodeReader<BITS> reader(codec);
  const int head_dim = codec.head_dim;
  const uint8_t* codes = stream.codes;
  for (int block = 0; block < 4; block += VECS) {
    F sum[ROWS][VECS];
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) sum[r][v] = splat(0.0f);
    }
    for (int c = 0; c < head_dim; c += 4) {
      if (block == 0) fetch_step<BITS>(stream.fetch);
      I words[VECS];
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) words[v] = reader.k_word(codes, c, block + v);
      F x[VECS];
      levels_of<BITS, 0>(reader, words, x);
      multiply_add<ROWS, VECS>(sum, x, q + c, head_dim);
      levels_of<BITS, 1>(reader, words, x);
      multiply_add<ROWS, VECS>(sum, x, q + c + 1, head_dim);
      levels_of<BITS, 2>(reader, words, x);
      multiply_add<ROWS, VECS>(sum, x, q + c + 2, head_dim);
      levels_of<BITS, 3>(reader, words, x);
      multiply_add<ROWS, VECS>(sum, x, q + c + 3, head_dim);
    }
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) store(scores + r * PAGE_SIZE + 16 * (block + v), sum[r][v]);
    }
  }
}

// out[r][c..] += sum over t of p[r][t] V[t][c..] for VECS vectors of channels.
template <int BITS, int ROWS, int VECS>
inline void multiply_v_columns(const SectionCodec& codec, CodeStream& stream, const float* p,
                               float* out, int c) {
  const CodeReader<BITS> reader(codec);
  const int head_dim = codec.head_dim;
  F sum[ROWS][VECS];
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) sum[r][v] = load(out + r * head_dim + c + 16 * v);
  }
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad, p += 4) {
    if (VECS > 1 || c % 64 == 0) fetch_step<BITS>(stream.fetch);
    I words[VECS];
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) words[v] = reader.v_word(stream.codes, c + 16 * v, quad);
    F x[VECS];
    levels_of<BITS, 0>(reader, words, x);
    multiply_add<ROWS, VECS>(sum, x, p, PAGE_SIZE);
    levels_of<BITS, 1>(reader, words, x);
    multiply_add<ROWS, VECS>(sum, x, p + 1, PAGE_SIZE);
    levels_of<BITS, 2>(reader, words, x);
    multiply_add<ROWS, VECS>(sum, x, p + 2, PAGE_SIZE);
    levels_of<BITS, 3>(reader, words, x);
    multiply_add<ROWS, VECS>(sum, x, p + 3, PAGE_SIZE);
  }
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int v = 0; v < VECS; ++v) store(out + r * head_dim + c + 16 * v, sum[r][v]);
  }
}

template <int BITS, int ROWS>
inline void multiply_v(const SectionCodec& codec, CodeStream stream, const float* p, float* out) {
  int c = 0;
  for (; c + 16 * FUSED_VECS <= codec.head_dim; c += 16 * FUSED_VECS) {
    multiply_v_columns<BITS, ROWS, FUSED_VECS>(codec, stream, p, out, c);
  }
  for (; c < codec.head_dim; c += 16) {
    multiply_v_columns<BITS, ROWS, 1>(codec, stream, p, out, c);
  }
}

// Calls body with the number of rows of a block as a compile-time constant.
template <class Body>
SMARTKV_INLINE void with_rows(int rows, const Body& body) {
  switch (rows) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
  }
}

inline void multiply_k_rows(const SectionCodec& codec, CodeStream stream, int rows, const float* q,
                            float* scores) {
  for (int r = 0; r < rows; r += FUSED_BLOCK) {
    with_rows(rows - r, [&]<int ROWS>() {
      with_bits(codec.bits, [&]<int BITS>() {
        multiply_k<BITS, ROWS>(codec, stream, q + r * codec.head_dim, scores + r * PAGE_SIZE);
      });
    });
    stream.fetch = no_lines(stream.codes);
  }
}

inline void multiply_v_rows(const SectionCodec& codec, CodeStream stream, int rows, const float* p,
                            float* out) {
  for (int r = 0; r < rows; r += FUSED_BLOCK) {
    with_rows(rows - r, [&]<int ROWS>() {
      with_bits(codec.bits, [&]<int BITS>() {
        multiply_v<BITS, ROWS>(codec, stream, p + r * PAGE_SIZE, out + r * codec.head_dim);
      });
    });
    stream.fetch = no_lines(stream.codes);
  }
}

}  // namespace smartkv::SMARTKV_ISA

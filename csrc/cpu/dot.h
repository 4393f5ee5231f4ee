// Products of few query rows with packed codes in integer arithmetic: four byte products per lane
// and instruction instead of one fused multiply-add. Levels are integers, so only the queries and
// the probabilities are rounded: to DIGITS bytes each.
//
// A query is a number in base 128 with signed digits, a probability one in base 256 with unsigned
// digits. The instructions take one unsigned operand. VNNI: K levels with 128 added, and the sums
// start at -128 times the digit sum of the query. AVX2: magnitudes of K levels, their signs moved
// to the query, and probabilities of 7 bits, because vpmaddubsw saturates at 16 bits.
#pragma once

namespace smartkv::SMARTKV_ISA {

#if defined(SMARTKV_AVX512)
constexpr int MAX_DIGITS = 2;
constexpr int PROBABILITY_DIGIT = 255;
constexpr int DOT_SUMS = 16;  // accumulators that fit beside operands and tables
#elif defined(SMARTKV_AVX2)
// Two digits would be no faster than fp32: three instructions for what one fma does per lane.
constexpr int MAX_DIGITS = 1;
constexpr int PROBABILITY_DIGIT = 127;
constexpr int DOT_SUMS = 4;
#else
constexpr int MAX_DIGITS = 0;
constexpr int PROBABILITY_DIGIT = 255;
constexpr int DOT_SUMS = 4;
#endif
constexpr int QUERY_DIGIT = 127;
constexpr bool K_BIASED = MAX_DIGITS == 2;
constexpr int QUERY_SHIFT = 7, PROBABILITY_SHIFT = 8;  // bits of the less significant digit

// sum + the four products of each 32-bit lane; `u` unsigned bytes, `s` signed bytes.
SMARTKV_INLINE I dot_bytes(I sum, [[maybe_unused]] I u, [[maybe_unused]] I s) {
#if defined(SMARTKV_AVX512)
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif defined(SMARTKV_AVX2)
  const auto half = [](v8i x, v8i y) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)y);
    return (v8i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  };
  return {sum.lo + half(u.lo, s.lo), sum.hi + half(u.hi, s.hi)};
#else
  return sum;
#endif
}

// The same with K levels as LevelBytes<K_BIASED> gives them.
SMARTKV_INLINE I dot_keys(I sum, I levels, I query) {
#if defined(SMARTKV_AVX2)
  const I magnitude = {(v8i)_mm256_abs_epi8((__m256i)levels.lo),
                       (v8i)_mm256_abs_epi8((__m256i)levels.hi)};
  const I moved = {(v8i)_mm256_sign_epi8((__m256i)query.lo, (__m256i)levels.lo),
                   (v8i)_mm256_sign_epi8((__m256i)query.hi, (__m256i)levels.hi)};
  return dot_bytes(sum, magnitude, moved);
#else
  return dot_bytes(sum, levels, query);
#endif
}

// Rows of integers: `digit` planes of [rows, stride] bytes, the most significant first.
struct DigitRows {
  const char* digits;
  int64_t plane_stride, stride;
  const float* scale;    // [rows], of the least significant digit
  const int32_t* start;  // [digits, rows], K only
  int64_t rows;

  SMARTKV_INLINE I at(int digit, int row, int64_t byte) const {
    int32_t word;
    __builtin_memcpy(&word, digits + digit * plane_stride + row * stride + byte, sizeof word);
    return splat(word);
  }
  SMARTKV_INLINE DigitRows from_row(int64_t row) const {
    return {digits + row * stride,
            plane_stride,
            stride,
            scale + row,
            start == nullptr ? nullptr : start + row,
            rows};
  }
};

template <int SHIFT, int DIGITS>
SMARTKV_INLINE F value_of(const I (&sum)[DIGITS]) {
  if constexpr (DIGITS == 1) return to_float(sum[0]);
  return to_float((sum[0] << SHIFT) + sum[DIGITS - 1]);
}

// scores[r][t] = q[r] . K[t], without the K scale.
template <int BITS, int DIGITS, int ROWS>
inline void dot_k(Section<BITS> keys, const LevelBytes<K_BIASED>& levels, const DigitRows& q,
                  float* scores) {
  constexpr int FIT = DOT_SUMS / (DIGITS * ROWS), VECS = FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
  for (int block = 0; block < 4; block += VECS) {
    I sum[ROWS][VECS][DIGITS];
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) {
        SMARTKV_UNROLL
        for (int d = 0; d < DIGITS; ++d) sum[r][v][d] = splat(q.start[d * q.rows + r]);
      }
    }
    for (int j = 0; j < keys.groups; ++j) {
      CodeWords<BITS> words[VECS];
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) {
        words[v] = keys.load(block + v, j);
        keys.prefetch();
      }
      each<CodeWords<BITS>::PARTS>([&]<int PART>() {
        I x[VECS];
        SMARTKV_UNROLL
        for (int v = 0; v < VECS; ++v) {
          x[v] = levels.template of<BITS>(words[v].template part<PART>());
        }
        const int64_t channel = 4 * int64_t{j + PART * keys.groups};
        SMARTKV_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          SMARTKV_UNROLL
          for (int d = 0; d < DIGITS; ++d) {
            const I y = q.at(d, r, channel);
            SMARTKV_UNROLL
            for (int v = 0; v < VECS; ++v) sum[r][v][d] = dot_keys(sum[r][v][d], x[v], y);
          }
        }
      });
    }
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      SMARTKV_UNROLL
      for (int v = 0; v < VECS; ++v) {
        store(scores + r * PAGE_SIZE + 16 * (block + v),
              value_of<QUERY_SHIFT>(sum[r][v]) * splat(q.scale[r]));
      }
    }
  }
}

// out[r][c..] += sum over t of p[r][t] V[t][c..] for LOADS neighbouring loads and PARTS parts.
template <int BITS, int DIGITS, int ROWS, int LOADS, int FIRST, int PARTS>
inline void dot_v_step(Section<BITS>& values, const LevelBytes<false>& levels, const DigitRows& p,
                       int j, float* out, int head_dim) {
  I sum[ROWS][LOADS][PARTS][DIGITS];
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int l = 0; l < LOADS; ++l) {
      SMARTKV_UNROLL
      for (int u = 0; u < PARTS; ++u) {
        SMARTKV_UNROLL
        for (int d = 0; d < DIGITS; ++d) sum[r][l][u][d] = splat(0);
      }
    }
  }
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad) {
    I x[LOADS][PARTS];
    SMARTKV_UNROLL
    for (int l = 0; l < LOADS; ++l) {
      const CodeWords<BITS> words = values.load(quad, j + l);
      if constexpr (FIRST == 0) values.prefetch();
      each<PARTS>([&]<int PART>() {
        x[l][PART] = levels.template of<BITS>(words.template part<FIRST + PART>());
      });
    }
    SMARTKV_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      SMARTKV_UNROLL
      for (int d = 0; d < DIGITS; ++d) {
        const I y = p.at(d, r, 4 * quad);
        SMARTKV_UNROLL
        for (int l = 0; l < LOADS; ++l) {
          SMARTKV_UNROLL
          for (int u = 0; u < PARTS; ++u) sum[r][l][u][d] = dot_bytes(sum[r][l][u][d], y, x[l][u]);
        }
      }
    }
  }
  SMARTKV_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SMARTKV_UNROLL
    for (int l = 0; l < LOADS; ++l) {
      SMARTKV_UNROLL
      for (int u = 0; u < PARTS; ++u) {
        float* at = out + r * head_dim + 16 * (j + l + (FIRST + u) * values.groups);
        store(at, fma(value_of<PROBABILITY_SHIFT>(sum[r][l][u]), splat(p.scale[r]), load(at)));
      }
    }
  }
}

template <int BITS, int DIGITS, int ROWS>
inline void dot_v(Section<BITS> values, const LevelBytes<false>& levels, const DigitRows& p,
                  float* out, int head_dim) {
  constexpr int ALL = CodeWords<BITS>::PARTS, FIT = DOT_SUMS / (DIGITS * ROWS);
  constexpr int PARTS = FIT >= 4 && ALL >= 4 ? 4 : FIT >= 2 && ALL >= 2 ? 2 : 1;
  constexpr int LOADS = FIT >= 2 * PARTS ? 2 : 1;
  const auto step = [&]<int N>(int j) {
    each<ALL / PARTS>([&]<int I>() {
      dot_v_step<BITS, DIGITS, ROWS, N, I * PARTS, PARTS>(values, levels, p, j, out, head_dim);
    });
  };
  int j = 0;
  for (; j + LOADS <= values.groups; j += LOADS) step.template operator()<LOADS>(j);
  if constexpr (LOADS > 1) {
    if (j < values.groups) step.template operator()<1>(j);
  }
}

// Most rows of one pass over the codes: decoding is shared by all of them.
constexpr int pass_rows(int digits) { return DOT_SUMS / digits >= 16 ? 8 : 4; }
// Rows per pass: in as few equal passes as possible.
SMARTKV_INLINE int rows_per_pass(int rows, int digits) {
  const int passes = (rows + pass_rows(digits) - 1) / pass_rows(digits);
  return (rows + passes - 1) / passes;
}
// From here on unpacking once is cheaper than decoding in every pass.
constexpr int UNPACKED_ROWS = 2 * FUSED_BLOCK;

// Calls body with bits, digits and rows as compile-time constants.
template <class Body>
SMARTKV_INLINE void with_products(int bits, [[maybe_unused]] int digits, int rows,
                                  const Body& body) {
  with_bits(bits, [&]<int BITS>() {
    const auto with_digits = [&]<int DIGITS>() {
      each<pass_rows(DIGITS)>([&]<int I>() {
        if (rows == I + 1) body.template operator()<BITS, DIGITS, I + 1>();
      });
    };
    if constexpr (MAX_DIGITS == 2) {
      if (digits == 2) return with_digits.template operator()<2>();
    }
    with_digits.template operator()<1>();
  });
}

inline void dot_k_rows(const SectionCodec& codec, int bits, CodeStream stream, int digits,
                       const DigitRows& q, int rows, float* scores) {
  const LevelBytes<K_BIASED> levels(codec.book);
  const int step = rows_per_pass(rows, digits);
  for (int r = 0; r < rows; r += step) {
    const int count = rows - r < step ? rows - r : step;
    with_products(bits, digits, count, [&]<int BITS, int DIGITS, int ROWS>() {
      dot_k<BITS, DIGITS, ROWS>(Section<BITS>(stream, codec.head_dim, K_LANES), levels,
                                q.from_row(r), scores + r * PAGE_SIZE);
    });
    stream.fetch = no_lines(stream.codes);  // one pass is enough
  }
}

inline void dot_v_rows(const SectionCodec& codec, int bits, CodeStream stream, int digits,
                       const DigitRows& p, int rows, float* out) {
  const LevelBytes<false> levels(codec.book);
  const int step = rows_per_pass(rows, digits), head_dim = codec.head_dim;
  for (int r = 0; r < rows; r += step) {
    const int count = rows - r < step ? rows - r : step;
    with_products(bits, digits, count, [&]<int BITS, int DIGITS, int ROWS>() {
      const auto multiply = [&]<int KIND>() {
        dot_v<KIND, DIGITS, ROWS>(Section<KIND>(stream, head_dim, V_LANES), levels, p.from_row(r),
                                  out + r * head_dim, head_dim);
      };
      if constexpr (BITS == 3) {
        if (is_half(bits, head_dim, V_LANES)) return multiply.template operator()<HALF_3>();
      }
      multiply.template operator()<BITS>();
    });
    stream.fetch = no_lines(stream.codes);
  }
}

template <int LANES>
inline void unpack_codes(const SectionCodec& codec, CodeStream stream, uint8_t* out) {
  with_bits(codec.bits, [&]<int BITS>() { unpack_section<BITS, LANES>(codec, stream, out); });
}

}  // namespace smartkv::SMARTKV_ISA

// Rows of floats as rows of integers of one or two bytes, see dot.h.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Query rows whose scores of a tile are held at a time; few rows hold those of several tiles.
constexpr int ROW_BLOCK = 32, BATCH_TILES = 4;

// Digits of the products with a tier; 0: fp32.
SMARTKV_INLINE int num_digits(Precision precision, int bits) {
  if (bits == 16 || precision == Precision::FLOAT32) return 0;
  const bool is_coarse = PROBABILITY_DIGIT < 255;  // too coarse beside 8-bit codes
  const bool fine =
      precision == Precision::INT16 || (bits == 8 && (is_coarse || precision == Precision::AUTO));
  const int digits = fine ? 2 : 1;
  return digits <= MAX_DIGITS ? digits : 0;
}

constexpr float TINY = 1e-30f;  // below, a quotient could overflow: everything rounds to zero

// Rows rounded to MAX_DIGITS digits; the first digit alone is the row rounded to one digit.
struct QueryDigits {
  int8_t* digits;   // [MAX_DIGITS, rows, head_dim], the most significant first
  float* scale[2];  // [rows] each, of the only and of the second digit
  int32_t* start;   // [MAX_DIGITS, rows], where the sums of products start
};

inline void split_query(const float* q, int head_dim, int64_t row, int64_t rows,
                        const QueryDigits& out) {
  constexpr bool TWO = MAX_DIGITS == 2;
  const int limit = TWO ? QUERY_DIGIT << QUERY_SHIFT : QUERY_DIGIT;
  const float top = max_magnitude(q, head_dim);
  const float most = static_cast<float>(limit);
  const F inverse = splat(top > TINY ? most / top : 0.0f);
  I sum[2] = {splat(0), splat(0)};
  uint8_t* high = reinterpret_cast<uint8_t*>(out.digits) + row * head_dim;
  for (int c = 0; c < head_dim; c += 16) {
    // Within the limit whatever the query holds: integers must not overflow, and a query that is no
    // number makes its scale none.
    const F scaled = vmin(vmax(load(q + c) * inverse, splat(-most)), splat(most));
    I x = round_int(scaled);
    if constexpr (TWO) {
      const I upper = (x + splat(1 << (QUERY_SHIFT - 1))) >> QUERY_SHIFT;
      const I lower = x - (upper << QUERY_SHIFT);
      store_codes(high + rows * head_dim + c, lower & splat(255));
      sum[1] = sum[1] + lower;
      x = upper;
    }
    store_codes(high + c, x & splat(255));
    sum[0] = sum[0] + x;
  }
  out.scale[0][row] = top / static_cast<float>(QUERY_DIGIT);
  out.scale[1][row] = top / static_cast<float>(limit);
  for (int d = 0; d < MAX_DIGITS; ++d) {
    const float total = K_BIASED ? hsum(to_float(sum[d])) : 0.0f;
    out.start[d * rows + row] = static_cast<int32_t>(-128.0f * total);
  }
}

struct ProbabilityDigits {
  uint8_t* digits;  // [digits, num_tiles * rows <= ROW_BLOCK, 64]
  float* scale;     // [BATCH_TILES, ROW_BLOCK]
};

constexpr int64_t PROBABILITY_PLANE = int64_t{ROW_BLOCK} * PAGE_SIZE;

template <int DIGITS>
constexpr int PROBABILITY_LIMIT =
    DIGITS == 2 ? (PROBABILITY_DIGIT << PROBABILITY_SHIFT) + 255 : PROBABILITY_DIGIT;

// Rounds 16 scaled weights in [0, PROBABILITY_LIMIT].
template <int DIGITS>
SMARTKV_INLINE void store_weights(uint8_t* high, F scaled) {
  const I n = round_int(scaled);
  if constexpr (DIGITS == 2) {
    store_codes(high, n >> PROBABILITY_SHIFT);
    store_codes(high + PROBABILITY_PLANE, n & splat(255));
  } else {
    store_codes(high, n);
  }
}

}  // namespace smartkv::SMARTKV_ISA

// The query rows of one kv head and their online softmax. Row r = query r / groups of query head
// r % groups, so that neighbouring rows see nearly the same keys.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Queries scaled by softmax_scale; `rotated`, `bias` = q . k_mean and `turns` serve the quantised
// tiers.
struct Queries {
  float* plain;      // [rows, head_dim]
  float* rotated;    // [rows, head_dim]
  float* bias;       // [rows]
  float* turns;      // [rows, turns, 2]: q . U and q . V
  float* poison;     // [rows], NaN where the query holds NaN or infinity, else 0
  QueryDigits ints;  // the rotated queries, where the products are integer
};

// Unnormalised output, running maximum and sum of each row.
struct State {
  float* o;    // [rows, head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

SMARTKV_INLINE int64_t num_groups(const DecodeAttentionParams& p) {
  return p.num_heads / p.cache.num_kv_heads;
}
SMARTKV_INLINE int64_t num_rows(const DecodeAttentionParams& p) { return num_groups(p) * p.q_len; }

// Index of a row in lse, and times head_dim in out.
inline int64_t output_row(const DecodeAttentionParams& p, int64_t head, int64_t row) {
  const int64_t groups = num_groups(p);
  return (head * groups + row % groups) * p.q_len + row / groups;
}

inline void prepare_queries(const DecodeAttentionParams& p, int64_t head, bool rotated,
                            const Queries& queries) {
  const int head_dim = p.cache.head_dim;
  const int64_t groups = num_groups(p), rows = num_rows(p);
  const int64_t b = head / p.cache.num_kv_heads, h = head % p.cache.num_kv_heads;
  const F scale = splat(p.softmax_scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* q = queries.plain + r * head_dim;
    load_row(q, row_of(p.q, b, h * groups + r % groups, r / groups), p.q.dtype, head_dim);
    F poison = splat(0.0f);
    for (int c = 0; c < head_dim; c += 16) {
      const F x = load(q + c) * scale;
      store(q + c, x);
      poison = fma(x, splat(0.0f), poison);
    }
    queries.poison[r] = hsum(poison);
    if (!rotated) continue;
    const KeyShift shift = shift_of(p.cache, head);
    F dot = splat(0.0f);
    for (int c = 0; c < head_dim; c += 16) dot = fma(load(q + c), load(shift.mean + c), dot);
    queries.bias[r] = hsum(dot);
    for (int i = 0; i < 2 * shift.turns; ++i) {
      const uint16_t* vector = shift.vectors + i * head_dim;
      dot = splat(0.0f);
      for (int c = 0; c < head_dim; c += 16) dot = fma(load(q + c), load_fp16(vector + c), dot);
      queries.turns[r * 2 * shift.turns + i] = hsum(dot);
    }
    __builtin_memcpy(queries.rotated + r * head_dim, q, head_dim * sizeof(float));
    if (shift.weights != nullptr) {
      divide_row(queries.rotated + r * head_dim, shift.weights, head_dim);
    }
    rotate(queries.rotated + r * head_dim, head_dim);
    if (MAX_DIGITS > 0 && p.precision != Precision::FLOAT32) {
      split_query(queries.rotated + r * head_dim, head_dim, r, rows, queries.ints);
    }
  }
}

// The maximum of a comparison may drop a NaN, a sum cannot.
inline void clear_state(State state, int64_t rows, int head_dim, const Queries& queries) {
  if (state.o != nullptr) __builtin_memset(state.o, 0, rows * head_dim * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    state.max[r] = -INFINITY;
    state.sum[r] = queries.poison[r];
  }
}

// All ones where the query sees the slots i..i+15.
SMARTKV_INLINE I visible_slots(const Tile& tile, Span span, int i) {
  const I position = load_words(tile.positions + i);
  return gt(position, splat(span.low - 1)) & gt(splat(span.high + 1), position);
}

// Writes one row's output and log-sum-exp; a row that saw nothing gives 0 and -inf, one of a query
// that is not finite NaN.
inline void finish_row(const DecodeAttentionParams& p, int64_t head, int64_t row, const float* o,
                       float max, float sum) {
  const int head_dim = p.cache.head_dim;
  const int64_t to = output_row(p, head, row);
  p.lse[to] = sum > 0 ? max + ::logf(sum) : sum - INFINITY;
  if (p.out == nullptr) return;
  alignas(64) float out[MAX_HEAD_DIM];
  const F inverse = splat(sum > 0 ? 1 / sum : sum);
  for (int c = 0; c < head_dim; c += 16) store(out + c, load(o + c) * inverse);
  store_row(at(p.out, p.q.dtype, to * head_dim), p.q.dtype, out, head_dim);
}

}  // namespace smartkv::SMARTKV_ISA

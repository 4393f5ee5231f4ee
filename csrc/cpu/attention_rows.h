// The query rows of one kv head and their online softmax. Row r = query r / groups of query head
// r % groups, so that neighbouring rows see nearly the same keys.
#pragma once

namespace smartkv::SMARTKV_ISA {

constexpr int ROW_BLOCK = 32;

// Queries scaled by softmax_scale; `rotated` and `bias` = q . k_mean serve the quantised tiers.
struct Queries {
  float* plain;    // [rows, head_dim]
  float* rotated;  // [rows, head_dim]
  float* bias;     // [rows]
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
                            Queries queries) {
  const int head_dim = p.cache.head_dim;
  const int64_t groups = num_groups(p), rows = num_rows(p);
  const int64_t b = head / p.cache.num_kv_heads, h = head % p.cache.num_kv_heads;
  const F scale = splat(p.softmax_scale);
  for (int64_t r = 0; r < rows; ++r) {
    float* q = queries.plain + r * head_dim;
    load_row(q, row_of(p.q, b, h * groups + r % groups, r / groups), p.q.dtype, head_dim);
    for (int c = 0; c < head_dim; c += 16) store(q + c, load(q + c) * scale);
    if (!rotated) continue;
    const float* k_mean = p.cache.k_mean + head * head_dim;
    F dot = splat(0.0f);
    for (int c = 0; c < head_dim; c += 16) dot = fma(load(q + c), load(k_mean + c), dot);
    queries.bias[r] = hsum(dot);
    __builtin_memcpy(queries.rotated + r * head_dim, q, head_dim * sizeof(float));
    rotate(queries.rotated + r * head_dim, head_dim);
  }
}

inline void clear_state(State state, int64_t rows, int head_dim) {
  if (state.o != nullptr) __builtin_memset(state.o, 0, rows * head_dim * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    state.max[r] = -INFINITY;
    state.sum[r] = 0;
  }
}

// All ones where the query sees the slots i..i+15.
SMARTKV_INLINE I visible_slots(const Tile& tile, Span span, int i) {
  const I position = load_words(tile.positions + i);
  return gt(position, splat(span.low - 1)) & gt(splat(span.high + 1), position);
}

// Scores of one row: products times the K scale plus the bias, -inf where unseen.
template <bool MASKED>
SMARTKV_INLINE void finish_scores(const Tile& tile, Span span, float bias, const float* s,
                                  F (&x)[4]) {
  SMARTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = fma(load(s + 16 * i), load(tile.k_scale + 16 * i), splat(bias));
    if constexpr (MASKED) {
      x[i] = select(visible_slots(tile, span, 16 * i), x[i], splat(-INFINITY));
    }
  }
}

// Replaces the products of a row by its probabilities times the V scale and updates its state.
template <bool MASKED>
inline void softmax_row(const Tile& tile, Span span, float bias, float* s, State state,
                        int head_dim) {
  F x[4];
  finish_scores<MASKED>(tile, span, bias, s, x);
  const float old_top = *state.max;
  const float tile_top = hmax(vmax(vmax(x[0], x[1]), vmax(x[2], x[3])));
  const float top = tile_top > old_top ? tile_top : old_top;
  if (MASKED && !(top > -INFINITY)) {
    __builtin_memset(s, 0, PAGE_SIZE * sizeof(float));
    return;
  }
  F total = splat(0.0f);
  SMARTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    F e = exp(x[i] - splat(top));
    F weighted = e * load(tile.v_scale + 16 * i);
    if constexpr (MASKED) {
      const I seen = visible_slots(tile, span, 16 * i);
      e = select(seen, e, splat(0.0f));
      weighted = select(seen, weighted, splat(0.0f));
    }
    total = total + e;
    store(s + 16 * i, weighted);
  }
  float shrink = 1;
  if (top > old_top) {
    shrink = ::expf(old_top - top);
    for (int c = 0; state.o != nullptr && c < head_dim; c += 16) {
      store(state.o + c, load(state.o + c) * splat(shrink));
    }
  }
  *state.max = top;
  *state.sum = *state.sum * shrink + hsum(total);
}

// Adds the final probabilities of a row to the mass of the 64 slots.
template <bool MASKED>
inline void add_mass_row(const Tile& tile, Span span, float bias, const float* s, float lse,
                         float* mass) {
  F x[4];
  finish_scores<MASKED>(tile, span, bias, s, x);
  SMARTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    F e = exp(x[i] - splat(lse));
    if constexpr (MASKED) e = select(visible_slots(tile, span, 16 * i), e, splat(0.0f));
    store(mass + 16 * i, load(mass + 16 * i) + e);
  }
}

// Writes one row's output and log-sum-exp; a row that saw nothing gives 0 and -inf.
inline void finish_row(const DecodeAttentionParams& p, int64_t head, int64_t row, const float* o,
                       float max, float sum) {
  const int head_dim = p.cache.head_dim;
  const int64_t to = output_row(p, head, row);
  p.lse[to] = sum > 0 ? max + ::logf(sum) : -INFINITY;
  if (p.out == nullptr) return;
  alignas(64) float out[MAX_HEAD_DIM];
  const F inverse = splat(sum > 0 ? 1 / sum : 0.0f);
  for (int c = 0; c < head_dim; c += 16) store(out + c, load(o + c) * inverse);
  store_row(at(p.out, p.q.dtype, to * head_dim), p.q.dtype, out, head_dim);
}

}  // namespace smartkv::SMARTKV_ISA

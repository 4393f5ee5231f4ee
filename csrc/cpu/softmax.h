// Online softmax of a block of rows over a few tiles: products in, weights (probabilities times the
// V scale) out, state brought up to date. Several tiles at a time, and what is one number per row
// for 16 rows at once: the chain from products to weights is long, and nothing else overlaps it.
#pragma once

namespace smartkv::SMARTKV_ISA {

struct Batch {
  const Tile* tiles;
  int num_tiles;
  const Span* spans;  // [count]
  const float* bias;  // [count], or null: the scores are final, K scale and bias included
  int count;          // rows; num_tiles * count is at most ROW_BLOCK
  int head_dim;
  float* scores;  // [num_tiles, count, 64]: products in; weights out where they stay floats
  ProbabilityDigits weights;
  State rows;  // of the first row

  SMARTKV_INLINE const float* bias_of(int row) const { return bias == nullptr ? bias : bias + row; }
  SMARTKV_INLINE float* scores_at(int tile, int row) const {
    return scores + (tile * count + row) * PAGE_SIZE;
  }
  SMARTKV_INLINE uint8_t* digits_at(int tile, int row) const {
    return weights.digits + (tile * count + row) * PAGE_SIZE;
  }
};

// One number per row, padded to vectors.
struct alignas(64) RowValues {
  float at[ROW_BLOCK];
};

template <int DIGITS>
SMARTKV_INLINE F exp_below(F x) {
  if constexpr (DIGITS == 0) return exp(x);
  return exp2_fast(x * splat(1.44269504f));
}

// Scores of a row: products times the K scale plus the bias, -inf where unseen. No bias: they are
// scores already.
template <bool MASKED>
SMARTKV_INLINE void finish_scores(const Tile& tile, Span span, const float* bias, const float* s,
                                  F (&x)[4]) {
  SMARTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = load(s + 16 * i);
    if (bias != nullptr) x[i] = fma(x[i], load(tile.k_scale + 16 * i), splat(*bias));
    if constexpr (MASKED) {
      x[i] = select(visible_slots(tile, span, 16 * i), x[i], splat(-INFINITY));
    }
  }
}

// At least ln x, at most 0.06 more: between powers of two the bits of a float follow its logarithm.
SMARTKV_INLINE F log_above(F x) {
  constexpr float LN_2 = 0.693147181f;
  return fma(to_float(as_int(x)), splat(LN_2 / (1 << 23)), splat(LN_2 * (0.087f - 127)));
}

// Largest score of each row, or where WEIGHTED at least the logarithm of its largest weight.
template <bool MASKED, bool WEIGHTED>
inline void find_tops(const Batch& batch, int tile, RowValues& tops) {
  for (int i = 0; i < ROW_BLOCK; i += 16) store(tops.at + i, splat(-INFINITY));
  for (int i = 0; i < batch.count; ++i) {
    F x[4];
    finish_scores<MASKED>(batch.tiles[tile], batch.spans[i], batch.bias_of(i),
                          batch.scores_at(tile, i), x);
    if constexpr (WEIGHTED) {
      SMARTKV_UNROLL
      for (int v = 0; v < 4; ++v) {
        x[v] = x[v] + log_above(load(batch.tiles[tile].v_scale + 16 * v));
      }
    }
    tops.at[i] = hmax(vmax(vmax(x[0], x[1]), vmax(x[2], x[3])));
  }
}

// What each row subtracts and multiplies by.
struct RowFactors {
  RowValues top;                     // running maximum; finite even where nothing has been seen
  RowValues shrink;                  // exp(old maximum - new maximum)
  RowValues to_digits[BATCH_TILES];  // integers per unit of weight
};

// `weighted`: of uneven tiles.
template <int DIGITS>
inline void advance_rows(const Batch& batch, const RowValues (&tops)[BATCH_TILES],
                         const RowValues (&weighted)[BATCH_TILES], RowFactors& factors) {
  for (int i = 0; i < batch.count; i += 16) {
    const F old = load(batch.rows.max + i);
    F top = old;
    for (int t = 0; t < batch.num_tiles; ++t) top = vmax(top, load(tops[t].at + i));
    const F finite = vmax(top, splat(-1e30f));
    store(batch.rows.max + i, top);
    store(factors.top.at + i, finite);
    store(factors.shrink.at + i, exp(old - finite));
    if constexpr (DIGITS == 0) continue;
    const F limit = splat(static_cast<float>(PROBABILITY_LIMIT<DIGITS>));
    for (int t = 0; t < batch.num_tiles; ++t) {
      // No weight of the tile is above: the row's largest exponential times the largest V scale,
      // far too much where a token of large values gets little attention.
      const Tile& tile = batch.tiles[t];
      F bound = exp_below<DIGITS>(load(tops[t].at + i) - finite) * splat(tile.v_top);
      if (tile.is_uneven) {
        bound = vmin(bound, exp_below<DIGITS>(load(weighted[t].at + i) - finite));
      }
      store(factors.to_digits[t].at + i, as_float(gt(bound, splat(TINY)) & as_int(limit / bound)));
      store(batch.weights.scale + t * ROW_BLOCK + i, bound / limit);
    }
  }
}

inline void shrink_output(const Batch& batch, const RowValues& shrink) {
  for (int i = 0; i < batch.count; ++i) {
    if (!(shrink.at[i] < 1)) continue;
    batch.rows.sum[i] *= shrink.at[i];
    if (batch.rows.o == nullptr) continue;
    float* o = batch.rows.o + i * batch.head_dim;
    for (int c = 0; c < batch.head_dim; c += 16) store(o + c, load(o + c) * splat(shrink.at[i]));
  }
}

template <bool MASKED, int DIGITS>
inline void weigh_tile(const Batch& batch, int t, const RowFactors& factors) {
  const Tile& tile = batch.tiles[t];
  uint16_t* shares = tile.shares.exponentials;
  if (shares != nullptr) {
    __builtin_memcpy(tile.shares.tops, factors.top.at, batch.count * sizeof(float));
  }
  for (int i = 0; i < batch.count; ++i) {
    float* s = batch.scores_at(t, i);
    F x[4], total = splat(0.0f);
    finish_scores<MASKED>(tile, batch.spans[i], batch.bias_of(i), s, x);
    SMARTKV_UNROLL
    for (int v = 0; v < 4; ++v) {
      F e = exp_below<DIGITS>(x[v] - splat(factors.top.at[i]));
      F weight = e * load(tile.v_scale + 16 * v);
      if constexpr (MASKED) {
        const I seen = visible_slots(tile, batch.spans[i], 16 * v);
        e = select(seen, e, splat(0.0f));
        weight = select(seen, weight, splat(0.0f));
      }
      total = total + e;
      if (shares != nullptr) store_fp16(shares + i * PAGE_SIZE + 16 * v, e);
      if constexpr (DIGITS == 0) {
        store(s + 16 * v, weight);
      } else {
        store_weights<DIGITS>(batch.digits_at(t, i) + 16 * v,
                              weight * splat(factors.to_digits[t].at[i]));
      }
    }
    batch.rows.sum[i] += hsum(total);
  }
}

template <int DIGITS>
inline void softmax_batch(const Batch& batch) {
  RowValues tops[BATCH_TILES], weighted[BATCH_TILES];
  RowFactors factors;
  for (int t = 0; t < batch.num_tiles; ++t) {
    const bool all = batch.tiles[t].all_visible;
    all ? find_tops<false, false>(batch, t, tops[t]) : find_tops<true, false>(batch, t, tops[t]);
    if (DIGITS == 0 || !batch.tiles[t].is_uneven) continue;
    all ? find_tops<false, true>(batch, t, weighted[t])
        : find_tops<true, true>(batch, t, weighted[t]);
  }
  advance_rows<DIGITS>(batch, tops, weighted, factors);
  shrink_output(batch, factors.shrink);
  for (int t = 0; t < batch.num_tiles; ++t) {
    batch.tiles[t].all_visible ? weigh_tile<false, DIGITS>(batch, t, factors)
                               : weigh_tile<true, DIGITS>(batch, t, factors);
  }
}

// Adds the final probabilities of a row to the mass of the 64 slots.
template <bool MASKED>
inline void add_mass_row(const Tile& tile, Span span, const float* bias, const float* s, float lse,
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

// Mass of the 64 slots from the exponentials that softmax kept; lse [rows].
inline void add_shares(const Shares& shares, int rows, const float* lse, float* mass) {
  RowValues factor;
  for (int i = 0; i < rows; ++i) factor.at[i] = shares.tops[i] - lse[i];
  for (int i = 0; i < rows; i += 16) store(factor.at + i, exp(load(factor.at + i)));
  F sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int i = 0; i < rows; ++i) {
    if (!(lse[i] > -INFINITY)) continue;
    SMARTKV_UNROLL
    for (int v = 0; v < 4; ++v) {
      sum[v] =
          fma(load_fp16(shares.exponentials + i * PAGE_SIZE + 16 * v), splat(factor.at[i]), sum[v]);
    }
  }
  SMARTKV_UNROLL
  for (int v = 0; v < 4; ++v) store(mass + 16 * v, sum[v]);
}

}  // namespace smartkv::SMARTKV_ISA

// What is not finite must show wherever it counts, and nowhere else.
#pragma once

#include "attention_problem.h"

namespace smartkv {

// Where a problem is spoiled: keys and values of the window and of raw pages, scales of codes.
enum class Spot { WINDOW_K, WINDOW_V, PAGE_K, PAGE_V, SCALE_K, SCALE_V, QUERY };

constexpr int BAD_CHANNEL = 5, BAD_SLOT = 5, BAD_RECORD = 70;  // of the first head

inline bool is_key(Spot spot) {
  return spot == Spot::WINDOW_K || spot == Spot::PAGE_K || spot == Spot::SCALE_K;
}

// Position of the token that is spoiled. `bad`: NaN or infinity.
inline int spoil(Problem& problem, Spot spot, float bad) {
  const bool is_k = is_key(spot);
  if (spot == Spot::QUERY) problem.q.set(BAD_CHANNEL, bad);
  if (spot == Spot::WINDOW_K || spot == Spot::WINDOW_V) {
    Dense& rows = is_k ? problem.k_window : problem.v_window;
    rows.set(rows.index(0, 0, BAD_SLOT) + BAD_CHANNEL, bad);
    return problem.window_positions[BAD_SLOT];
  }
  Cache& cache = problem.cache;
  const PageLayout layout = cache.layout(0);
  const bool is_scale = spot == Spot::SCALE_K || spot == Spot::SCALE_V;
  const DType dtype = is_scale ? DType::FLOAT16 : problem.c.dtype;
  Dense value(dtype, 1, 1, 1, problem.c.head_dim);
  value.set(0, bad);
  int64_t start = is_k ? layout.k_codes : layout.v_codes;
  int64_t element = BAD_RECORD % PAGE_SIZE;
  if (is_scale) {
    start = is_k ? layout.k_scale : layout.v_scale;
  } else {
    element = element * problem.c.head_dim + BAD_CHANNEL;
  }
  if (spot != Spot::QUERY) {
    std::memcpy(cache.page(0, 0, BAD_RECORD) + start + element * dtype_size(dtype),
                value.bytes.data(), dtype_size(dtype));
  }
  return cache.position(0, 0, BAD_RECORD);
}

inline void check_spot(const KernelTable& kernels, Precision precision, Spot spot, DType dtype,
                       int64_t q_len, float bad) {
  const Case c{1, 2, 2, 64, dtype, q_len, 70, 400, 0};
  const bool is_raw = spot == Spot::PAGE_K || spot == Spot::PAGE_V;
  Problem problem(c, {is_raw ? 16 : 4}, {130}, Levels::GAUSSIAN);
  const int position = spoil(problem, spot, bad);
  Dense out(dtype, 1, 4, q_len, 64);
  std::vector<float> lse(4 * q_len);
  DecodeAttentionParams p = problem.params();
  p.out = out.bytes.data();
  p.lse = lse.data();
  p.precision = precision;
  kernels.decode_attention(p, testing::parallel(3));
  for (int64_t row = 0; row < 4 * q_len; ++row) {
    const float x = out.get(row * 64 + BAD_CHANNEL);
    const bool sees = row < 2 * q_len && is_visible(c, position, row % q_len);
    if (spot == Spot::QUERY ? row == 0 : sees) {
      // A score of -inf is no weight at all.
      const bool is_hidden = is_key(spot) && std::isinf(bad) &&
                             !(problem.q.get(problem.q.index(0, 0, row) + BAD_CHANNEL) > 0);
      CHECK(is_hidden || !std::isfinite(x), "%s: spot %d, row %d: %g", kernels.name,
            static_cast<int>(spot), static_cast<int>(row), x);
      if (is_key(spot) || spot == Spot::QUERY) {
        CHECK(is_hidden || !std::isfinite(lse[row]), "%s: spot %d, row %d: lse %g", kernels.name,
              static_cast<int>(spot), static_cast<int>(row), lse[row]);
      }
    } else if (is_key(spot) || spot == Spot::QUERY || row >= 2 * q_len) {
      // A value may spoil rows of its head that give it no weight: zero times NaN.
      CHECK(std::isfinite(x) && std::isfinite(lse[row]), "%s: spot %d, row %d: %g, lse %g",
            kernels.name, static_cast<int>(spot), static_cast<int>(row), x, lse[row]);
    }
  }
}

// In every spot, seen by all queries or by some.
inline void check_not_finite(const KernelTable& kernels, Precision precision) {
  int turn = 0;
  for (int64_t q_len : {1, 20}) {
    for (float bad : {NAN, INFINITY}) {
      for (Spot spot : {Spot::WINDOW_K, Spot::WINDOW_V, Spot::PAGE_K, Spot::PAGE_V, Spot::SCALE_K,
                        Spot::SCALE_V, Spot::QUERY}) {
        // Integers cannot carry a scale that is NaN to the output.
        const bool is_scale = spot == Spot::SCALE_K || spot == Spot::SCALE_V;
        if (is_scale && (std::isinf(bad) || precision != Precision::FLOAT32)) continue;
        constexpr DType DTYPES[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};
        check_spot(kernels, precision, spot, DTYPES[turn++ % 3], q_len, bad);
      }
    }
  }
}

// The score of a key that is NaN is NaN, which select_kv does not take; others keep theirs.
inline void check_gate_keeps_nan(const KernelTable& kernels, const std::vector<int>& sizes,
                                 DType dtype, int n) {
  testing::Dense keys(dtype, 1, 1, n, sizes[0]);
  keys.fill_normal();
  keys.set(keys.index(0, 0, n / 2) + 5, NAN);
  const HeadsView view = keys.view();
  std::vector<float> scores(n);
  std::vector<std::vector<float>> weights;
  GateScoreParams p{};
  p.keys = &view;
  p.num_linear = static_cast<int>(sizes.size()) - 1;
  for (int i = 0; i < p.num_linear; ++i) {
    weights.emplace_back(sizes[i] * sizes[i + 1], 0.1f);
  }
  for (int i = 0; i < p.num_linear; ++i) p.weights[i] = p.biases[i] = weights[i].data();
  std::copy(sizes.begin(), sizes.end(), p.sizes);
  p.scores = scores.data();
  p.num_layers = p.batch = p.num_kv_heads = 1;
  p.kv_len = n;
  kernels.gate_score(p, testing::parallel(1));
  for (int i = 0; i < n; ++i) {
    CHECK(std::isnan(scores[i]) == (i == n / 2), "%s: score %d is %g", kernels.name, i, scores[i]);
  }
}

// Rows 0 and 1: a state whose log-sum-exp is NaN, alone or beside another. Row 2: a value is NaN.
inline void check_merge_keeps_nan(const KernelTable& kernels) {
  testing::Dense o(DType::FLOAT32, 2, 1, 4, 64), out(DType::FLOAT32, 1, 1, 4, 64);
  o.fill_normal();
  o.set(2 * 64, NAN);
  const std::vector<float> lse = {NAN, 1, 1, 1, -INFINITY, NAN, 1, 1};
  std::vector<float> merged(4);
  kernels.merge_states(
      {o.bytes.data(), lse.data(), out.bytes.data(), merged.data(), o.dtype, 2, 4, 64},
      testing::parallel(2));
  for (int row = 0; row < 4; ++row) {
    CHECK(std::isnan(merged[row]) == (row < 2), "%s: row %d: lse %g", kernels.name, row,
          merged[row]);
    CHECK(std::isnan(out.get(row * 64)) == (row < 3), "%s: row %d: %g", kernels.name, row,
          out.get(row * 64));
  }
}

}  // namespace smartkv

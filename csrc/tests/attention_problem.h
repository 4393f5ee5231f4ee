// An attention problem with awkward lengths and poisoned memory, its result in double precision,
// and the comparison of any kernel set with it.
#pragma once

#include <sstream>

#include "testing.h"

namespace smartkv {

using testing::Cache;
using testing::Dense;
using testing::is_close;

constexpr float SOFTMAX_SCALE = 0.1f;

// Keys that one head can see, in double precision.
struct Keys {
  std::vector<std::vector<double>> k, v;
  std::vector<int> positions;
};

struct Oracle {
  std::vector<double> out, lse, mass;
};

struct Case {
  int batch, kv_heads, groups, head_dim;
  DType dtype;
  int64_t q_len, window_len, q_start, sliding_window;
};

inline bool is_visible(const Case& c, int position, int64_t query) {
  const int64_t at = c.q_start + query;
  if (position < 0 || position > at) return false;
  return c.sliding_window == 0 || position > at - c.sliding_window;
}

// `mass` of the result: one value per key, summed over the rows of the head.
inline Oracle attend(const Case& c, const Keys& keys, const Dense& q, int b, int h, double scale) {
  Oracle result;
  result.mass.resize(keys.k.size());
  for (int g = 0; g < c.groups; ++g) {
    for (int64_t i = 0; i < c.q_len; ++i) {
      const int64_t at = q.index(b, h * c.groups + g, i);
      std::vector<double> scores(keys.k.size(), -INFINITY), out(c.head_dim);
      double total = 0, top = -INFINITY;
      for (size_t n = 0; n < keys.k.size(); ++n) {
        if (!is_visible(c, keys.positions[n], i)) continue;
        double dot = 0;
        for (int d = 0; d < c.head_dim; ++d) dot += q.get(at + d) * keys.k[n][d];
        scores[n] = dot * scale;
        top = std::max(top, scores[n]);
      }
      for (double s : scores) total += s > -INFINITY ? std::exp(s - top) : 0;
      for (size_t n = 0; n < keys.k.size(); ++n) {
        if (!(scores[n] > -INFINITY)) continue;
        const double p = std::exp(scores[n] - top) / total;
        result.mass[n] += p;
        for (int d = 0; d < c.head_dim; ++d) out[d] += p * keys.v[n][d];
      }
      result.out.insert(result.out.end(), out.begin(), out.end());
      result.lse.push_back(total > 0 ? top + std::log(total) : -INFINITY);
    }
  }
  return result;
}

struct Problem {
  Case c;
  Cache cache;
  Dense q, k_window, v_window;
  std::vector<int32_t> window_positions;
  std::vector<Keys> keys;  // per head, tiers first, then the window

  Problem(const Case& c, const std::vector<int>& bits, const std::vector<int>& lengths,
          Levels levels, int64_t max_pages = 4, int turns = 0)
      : c(c),
        cache(bits, c.batch, c.kv_heads, c.head_dim, max_pages, c.dtype, levels, turns),
        q(c.dtype, c.batch, c.kv_heads * c.groups, c.q_len, c.head_dim),
        k_window(c.dtype, c.batch, c.kv_heads, c.window_len, c.head_dim),
        v_window(k_window),
        window_positions(c.batch * c.window_len),
        keys(c.batch * c.kv_heads) {
    q.fill_normal();
    fill_pages(lengths);
    fill_window();
    for (size_t head = 0; head < keys.size(); ++head) collect_keys(static_cast<int>(head));
    poison();
  }

  void fill_pages(const std::vector<int>& lengths) {
    const int num_tiers = cache.num_tiers(), heads = c.batch * c.kv_heads;
    int longest = 0;
    for (int n : lengths) longest = std::max(longest, n);
    for (int t = 0; t < num_tiers; ++t) {
      Dense k(c.dtype, c.batch, c.kv_heads, longest, c.head_dim), v = k;
      k.fill_normal();
      v.fill_normal();
      std::vector<int8_t> tiers(heads * longest, -1);
      for (int head = 0; head < heads; ++head) {
        const int n = lengths[(head + t) % lengths.size()];
        std::fill_n(tiers.begin() + head * longest, n, static_cast<int8_t>(t));
      }
      cache.append(kernel_set("portable"), k, v, tiers, 0);
    }
  }

  void fill_window() {
    k_window.fill_normal();
    v_window.fill_normal();
    for (size_t i = 0; i < window_positions.size(); ++i) {
      const bool empty = i % 5 == 2;
      window_positions[i] = empty ? -1 : static_cast<int32_t>(c.q_start + c.q_len - 1 - i % 90);
      if (!empty) continue;
      const int b = static_cast<int>(i / c.window_len);
      for (int h = 0; h < c.kv_heads; ++h) {
        for (int d = 0; d < c.head_dim; ++d) {
          k_window.set(k_window.index(b, h, i % c.window_len) + d, NAN);
          v_window.set(v_window.index(b, h, i % c.window_len) + d, NAN);
        }
      }
    }
  }

  void add_key(int head, const Dense& k, const Dense& v, int64_t at, int position) {
    std::vector<double> k_row, v_row;
    for (int d = 0; d < c.head_dim; ++d) {
      k_row.push_back(k.get(at + d));
      v_row.push_back(v.get(at + d));
    }
    keys[head].k.push_back(k_row);
    keys[head].v.push_back(v_row);
    keys[head].positions.push_back(position);
  }

  void collect_keys(int head) {
    for (int t = 0; t < cache.num_tiers(); ++t) {
      Dense k(cache.bits[t] == 16 ? c.dtype : DType::FLOAT32, 1, 1, 64, c.head_dim), v = k;
      for (int i = 0; i < cache.length(head, t); ++i) {
        if (i % 64 == 0) cache.read(kernel_set("portable"), head, t, i / 64, k, v);
        add_key(head, k, v, i % 64 * c.head_dim, cache.position(head, t, i));
      }
    }
    const int b = head / c.kv_heads, h = head % c.kv_heads;
    for (int64_t i = 0; i < c.window_len; ++i) {
      add_key(head, k_window, v_window, k_window.index(b, h, i),
              window_positions[b * c.window_len + i]);
    }
  }

  // All but the outputs and the options of decode_attention.
  DecodeAttentionParams params() {
    DecodeAttentionParams p{};
    p.cache = cache.view();
    p.q = q.view();
    p.k_window = k_window.view();
    p.v_window = v_window.view();
    p.window_positions = window_positions.data();
    p.num_heads = c.kv_heads * c.groups;
    p.q_len = c.q_len;
    p.window_len = c.window_len;
    p.q_start = &c.q_start;
    p.softmax_scale = SOFTMAX_SCALE;
    p.sliding_window = c.sliding_window;
    return p;
  }

  // Page ids behind the last page must not be followed.
  void poison() {
    for (int head = 0; head < c.batch * c.kv_heads; ++head) {
      for (int t = 0; t < cache.num_tiers(); ++t) {
        const int64_t used = (cache.length(head, t) + 63) / 64;
        for (int64_t i = used; i < cache.max_pages; ++i) {
          cache.table[(head * cache.num_tiers() + t) * cache.max_pages + i] = INT32_MAX;
        }
      }
    }
  }
};

inline void check_mass(Problem& problem, const KernelTable& kernels, int head,
                       const Oracle& expected, const std::vector<float>& mass,
                       const std::vector<float>& window_mass, double tolerance) {
  Cache& cache = problem.cache;
  const int64_t capacity = cache.max_pages * PAGE_SIZE;
  size_t key = 0;
  for (int t = 0; t < cache.num_tiers(); ++t) {
    for (int64_t i = 0; i < capacity; ++i) {
      const double want = i < cache.length(head, t) ? expected.mass[key++] : 0;
      const double got = mass[(head * cache.num_tiers() + t) * capacity + i];
      CHECK(is_close(got, want, tolerance), "%s: mass %g, not %g", kernels.name, got, want);
    }
  }
  for (int64_t i = 0; i < problem.c.window_len; ++i) {
    const double got = window_mass[head * problem.c.window_len + i];
    CHECK(is_close(got, expected.mass[key++], tolerance), "%s: window mass %g", kernels.name, got);
  }
}

// How far the result may be off beside the rounding of the output, on values of order 1.
inline double tolerance_of(Precision precision) {
  return precision == Precision::FLOAT32 ? 2e-5 : precision == Precision::INT16 ? 1e-3 : 6e-2;
}

// The errors of many values at once, against their size.
inline double relative_error(const Dense& out, int64_t first, const std::vector<double>& expected) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(out.get(first + i) - expected[i], 2);
    power += expected[i] * expected[i];
  }
  return power > 0 ? std::sqrt(error / power) : error;
}
// AVX2 has 7 bits for a probability, the others 8; over the few tokens of these problems rounding
// averages less than over the many of python_tests/ops/test_op_precision.py.
inline double int8_error(const KernelTable& kernels) {
  return std::string(kernels.name) == "avx2" ? 4e-2 : 2e-2;
}

inline std::string tiers_text(const std::vector<int>& tiers) {
  std::ostringstream text;
  for (int tier : tiers) text << tier << " ";
  return text.str();
}

inline void check_decode(Problem& problem, const KernelTable& kernels, int threads, bool with_mass,
                         Precision precision = Precision::FLOAT32) {
  const Case& c = problem.c;
  Dense out(c.dtype, c.batch, c.kv_heads * c.groups, c.q_len, c.head_dim);
  std::fill(out.bytes.begin(), out.bytes.end(), 0xff);
  std::vector<float> lse(c.batch * c.kv_heads * c.groups * c.q_len, NAN);
  const int64_t heads = c.batch * c.kv_heads;
  std::vector<float> mass(heads * problem.cache.num_tiers() * problem.cache.max_pages * PAGE_SIZE);
  std::vector<float> window_mass(heads * c.window_len + 1);
  DecodeAttentionParams p = problem.params();
  p.out = out.bytes.data();
  p.lse = lse.data();
  p.mass = with_mass ? mass.data() : nullptr;
  p.window_mass = with_mass ? window_mass.data() : nullptr;
  p.precision = precision;
  kernels.decode_attention(p, testing::parallel(threads));
  const double arithmetic = tolerance_of(precision);
  const double tolerance = arithmetic + (c.dtype == DType::FLOAT32    ? 0
                                         : c.dtype == DType::BFLOAT16 ? 5e-3
                                                                      : 1e-3);
  for (int head = 0; head < heads; ++head) {
    const int b = head / c.kv_heads, h = head % c.kv_heads;
    const Oracle expected = attend(c, problem.keys[head], problem.q, b, h, SOFTMAX_SCALE);
    const int64_t first = out.index(b, h * c.groups, 0);
    for (size_t i = 0; i < expected.out.size(); ++i) {
      CHECK(is_close(out.get(first + i), expected.out[i], tolerance),
            "%s: tiers %s, head_dim %d, q_len %d, groups %d, precision %d, %d threads, head %d: "
            "%g, not %g",
            kernels.name, tiers_text(problem.cache.bits).c_str(), c.head_dim,
            static_cast<int>(c.q_len), c.groups, static_cast<int>(precision), threads, head,
            out.get(first + i), expected.out[i]);
    }
    const double relative = relative_error(out, first, expected.out);
    CHECK(relative < int8_error(kernels),
          "%s: tiers %s, head_dim %d, precision %d: relative error %g", kernels.name,
          tiers_text(problem.cache.bits).c_str(), c.head_dim, static_cast<int>(precision),
          relative);
    for (size_t i = 0; i < expected.lse.size(); ++i) {
      const double got = lse[first / c.head_dim + i];
      CHECK(is_close(got, expected.lse[i], arithmetic), "lse %g, not %g", got, expected.lse[i]);
    }
    if (with_mass) check_mass(problem, kernels, head, expected, mass, window_mass, arithmetic);
  }
}

// One call whose arguments stay while memory changes: the window's slots have the positions that
// their tokens will have, and hold NaN until the query reaches them.
inline void check_steps(const KernelTable& kernels) {
  Problem problem({1, 2, 2, 64, DType::BFLOAT16, 1, 70, 150, 0}, {4}, {130}, Levels::GAUSSIAN);
  const int64_t window_len = problem.c.window_len, first = 140;
  for (int64_t i = 0; i < window_len; ++i) {
    int32_t& position = problem.window_positions[i];
    if (position >= 0) position = static_cast<int32_t>(first + i);
    for (Keys& keys : problem.keys) {
      keys.positions[keys.positions.size() - window_len + i] = position;
    }
  }
  const Dense k = problem.k_window, v = problem.v_window;
  for (int64_t now : {first, first + 11, first + 64, first + window_len - 1}) {
    problem.c.q_start = now;
    problem.k_window.bytes = k.bytes;
    problem.v_window.bytes = v.bytes;
    for (int64_t i = now - first + 1; i < window_len; ++i) {
      for (int64_t h = 0; h < problem.c.kv_heads; ++h) {
        for (int d = 0; d < problem.c.head_dim; ++d) {
          problem.k_window.set(k.index(0, h, i) + d, NAN);
          problem.v_window.set(v.index(0, h, i) + d, NAN);
        }
      }
    }
    check_decode(problem, kernels, 2, true);
  }
}

// With and without a given log-sum-exp.
inline void check_attention_mass(const KernelTable& kernels) {
  for (int64_t sliding : {0, 30}) {
    const Case c{2, 2, 2, 80, DType::BFLOAT16, 50, 150, 80, sliding};
    Problem problem(c, {}, {0}, Levels::GAUSSIAN);
    std::vector<float> lse(c.batch * c.kv_heads * c.groups * c.q_len, 1.5f);
    for (bool given : {false, true}) {
      std::vector<float> mass(c.batch * c.kv_heads * c.window_len);
      kernels.attention_mass(
          {problem.q.view(), problem.k_window.view(), problem.window_positions.data(),
           given ? lse.data() : nullptr, mass.data(), c.batch, c.kv_heads * c.groups, c.kv_heads,
           c.head_dim, c.q_len, c.window_len, &c.q_start, SOFTMAX_SCALE, sliding},
          testing::parallel(3));
      for (int head = 0; head < c.batch * c.kv_heads; ++head) {
        const int b = head / c.kv_heads, h = head % c.kv_heads;
        Oracle expected = attend(c, problem.keys[head], problem.q, b, h, SOFTMAX_SCALE);
        if (given) {
          // A constant lse turns the mass into a sum of exponentials: check one key only.
          std::fill(expected.mass.begin(), expected.mass.end(), 0.0);
          const Keys& keys = problem.keys[head];
          for (int64_t row = 0; row < c.groups * c.q_len; ++row) {
            if (!is_visible(c, keys.positions[0], row % c.q_len)) continue;
            const int64_t at = problem.q.index(b, h * c.groups, row);
            double dot = 0;
            for (int d = 0; d < c.head_dim; ++d) dot += problem.q.get(at + d) * keys.k[0][d];
            expected.mass[0] += std::exp(dot * SOFTMAX_SCALE - 1.5);
          }
        }
        for (int64_t i = 0; i < (given ? 1 : c.window_len); ++i) {
          const double got = mass[head * c.window_len + i];
          CHECK(is_close(got, expected.mass[i], 5e-5), "%s: %g, not %g", kernels.name, got,
                expected.mass[i]);
        }
      }
    }
  }
}

}  // namespace smartkv

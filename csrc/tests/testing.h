// A few lines in place of a test framework, and the pieces that several tests share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "smartkv/isa.h"
#include "smartkv/layout.h"
#include "smartkv/params.h"

namespace testing {

inline int failures = 0;

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    if (!(condition)) {                                                      \
      if (++testing::failures <= 20) {                                       \
        std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
        std::printf(" " __VA_ARGS__);                                        \
        std::printf("\n");                                                   \
      }                                                                      \
    }                                                                        \
  } while (false)

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}

inline int num_threads = 1;

inline void run_threads(int64_t count, void* context, void (*fn)(void*, int64_t, int64_t)) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    const int64_t begin = count * i / num_threads, end = count * (i + 1) / num_threads;
    if (begin < end) threads.emplace_back(fn, context, begin, end);
  }
  for (std::thread& thread : threads) thread.join();
}

inline smartkv::Parallel parallel(int threads = 1) {
  num_threads = threads;
  return {run_threads, threads};
}

inline std::mt19937& random() {
  static std::mt19937 generator(20);
  return generator;
}

inline int random_int(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random());
}

inline std::vector<float> normals(size_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(count);
  for (float& value : x) value = normal(random());
  return x;
}

// A dense tensor (batch, heads, n, head_dim) of any dtype, with its values as floats.
struct Dense {
  smartkv::DType dtype;
  int batch, heads, head_dim;
  int64_t n;
  std::vector<uint8_t> bytes;

  Dense(smartkv::DType dtype, int batch, int heads, int64_t n, int head_dim)
      : dtype(dtype), batch(batch), heads(heads), head_dim(head_dim), n(n) {
    bytes.resize(size() * smartkv::dtype_size(dtype) + 64);
  }

  int64_t size() const { return int64_t{batch} * heads * n * head_dim; }

  void set(int64_t i, float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (dtype == smartkv::DType::FLOAT32) {
      std::memcpy(bytes.data() + 4 * i, &x, 4);
      return;
    }
    // Truncation is good enough for test data.
    const uint16_t half =
        dtype == smartkv::DType::BFLOAT16
            ? static_cast<uint16_t>(u >> 16)
            : static_cast<uint16_t>((u >> 16 & 0x8000) |
                                    (std::isnan(x)   ? 0x7e00
                                     : std::isinf(x) ? 0x7c00
                                     : std::fabs(x) < 6.2e-5f
                                         ? 0
                                         : ((u & 0x7fffffff) - 0x38000000) >> 13));
    std::memcpy(bytes.data() + 2 * i, &half, 2);
  }

  float get(int64_t i) const {
    if (dtype == smartkv::DType::FLOAT32) {
      float x;
      std::memcpy(&x, bytes.data() + 4 * i, 4);
      return x;
    }
    uint16_t h;
    std::memcpy(&h, bytes.data() + 2 * i, 2);
    if (dtype == smartkv::DType::BFLOAT16) {
      const uint32_t u = static_cast<uint32_t>(h) << 16;
      float x;
      std::memcpy(&x, &u, 4);
      return x;
    }
    const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }

  void fill_normal(float scale = 1) {
    const std::vector<float> x = normals(size(), scale);
    for (int64_t i = 0; i < size(); ++i) set(i, x[i]);
  }

  smartkv::HeadsView view() const {
    return {bytes.data(), dtype, heads * n * head_dim, n * head_dim, head_dim};
  }

  int64_t index(int64_t b, int64_t h, int64_t i) const {
    return ((b * heads + h) * n + i) * head_dim;
  }
};

// Random turns of the mean keys of some heads.
struct TurningMeans {
  Dense vectors;
  std::vector<int32_t> steps;
  std::vector<float> weights;  // where there are turns
  int count;

  TurningMeans(int count, int64_t batch, int64_t heads, int64_t head_dim)
      : vectors(smartkv::DType::FLOAT16, batch, heads, 2 * count, head_dim),
        steps(batch * heads * count),
        weights(normals(batch * heads * head_dim, 0.2f)),
        count(count) {
    vectors.fill_normal(0.3f);  // sharper attention would average less of what int8 rounds
    for (float& weight : weights) weight = std::exp(weight);
    for (int32_t& step : steps) step = random_int(INT32_MIN, INT32_MAX);
  }

  // From a (sequence, KV head) on.
  smartkv::Turns view(int64_t first = 0) const {
    if (count == 0) return {};
    const auto* at = reinterpret_cast<const uint16_t*>(vectors.bytes.data());
    return {at + first * vectors.n * vectors.head_dim, steps.data() + first * count, count,
            weights.data() + first * vectors.head_dim};
  }
};

// A paged cache over pools of garbage, with a shuffled block table.
struct Cache {
  std::vector<int> bits;
  int batch, heads, head_dim;
  int64_t max_pages;
  std::vector<std::vector<uint8_t>> pools;
  std::vector<int32_t> table, seqlens;
  std::vector<float> k_mean;
  smartkv::DType dtype;
  smartkv::Levels levels;
  TurningMeans turns;

  Cache(std::vector<int> tier_bits, int batch, int heads, int head_dim, int64_t max_pages,
        smartkv::DType dtype, smartkv::Levels levels, int num_turns = 0)
      : bits(std::move(tier_bits)),
        batch(batch),
        heads(heads),
        head_dim(head_dim),
        max_pages(max_pages),
        k_mean(normals(static_cast<size_t>(batch) * heads * head_dim)),
        dtype(dtype),
        levels(levels),
        turns(num_turns, batch, heads, head_dim) {
    const int64_t num_tiers = static_cast<int64_t>(bits.size());
    const int64_t pages = batch * heads * max_pages;
    table.resize(pages * num_tiers);
    seqlens.assign(batch * heads * num_tiers, 0);
    for (int64_t t = 0; t < num_tiers; ++t) {
      pools.emplace_back(pages * page_bytes(t), 0xff);  // NaN wherever it is read as a float
      std::vector<int32_t> ids(pages);
      for (int64_t i = 0; i < pages; ++i) ids[i] = static_cast<int32_t>(i);
      std::shuffle(ids.begin(), ids.end(), random());
      for (int64_t i = 0; i < pages; ++i) {
        const int64_t head = i / max_pages;
        table[(head * num_tiers + t) * max_pages + i % max_pages] = ids[i];
      }
    }
  }

  int num_tiers() const { return static_cast<int>(bits.size()); }
  smartkv::PageLayout layout(int64_t t) const {
    return smartkv::page_layout(bits[t], head_dim, smartkv::dtype_size(dtype));
  }
  int64_t page_bytes(int64_t t) const { return layout(t).page_bytes; }
  int32_t& length(int64_t head, int64_t t) { return seqlens[head * num_tiers() + t]; }

  uint8_t* page(int64_t head, int64_t t, int64_t i) {
    const int64_t id = table[(head * num_tiers() + t) * max_pages + i / smartkv::PAGE_SIZE];
    return pools[t].data() + id * page_bytes(t);
  }
  int32_t position(int64_t head, int64_t t, int64_t i) {
    int32_t x;
    std::memcpy(&x, page(head, t, i) + layout(t).position + i % smartkv::PAGE_SIZE * 4, 4);
    return x;
  }

  smartkv::PagedKV view() {
    smartkv::PagedKV v{};
    for (int t = 0; t < num_tiers(); ++t) {
      v.pools[t] = pools[t].data();
      v.page_bytes[t] = page_bytes(t);
      v.num_pages[t] = batch * heads * max_pages;
      v.tier_bits[t] = bits[t];
    }
    v.num_tiers = num_tiers();
    v.block_table = table.data();
    v.cache_seqlens = seqlens.data();
    v.max_pages = max_pages;
    v.k_mean = k_mean.data();
    v.batch = batch;
    v.num_kv_heads = heads;
    v.head_dim = head_dim;
    v.raw_dtype = dtype;
    v.levels = levels;
    v.turns = turns.view();
    return v;
  }

  // Appends `tiers` (heads x n) with positions first_position + i and random scores.
  void append(const smartkv::KernelTable& kernels, const Dense& k, const Dense& v,
              const std::vector<int8_t>& tiers, int first_position, int threads = 1) {
    std::vector<int32_t> positions(tiers.size());
    std::vector<float> scores = normals(tiers.size());
    for (size_t i = 0; i < tiers.size(); ++i) {
      positions[i] = first_position + static_cast<int32_t>(i % k.n);
    }
    kernels.append_kv(
        {view(), k.view(), v.view(), positions.data(), scores.data(), tiers.data(), k.n},
        parallel(threads));
  }

  // Value-dtype K and V rows of a record, by dequantize_kv on its page.
  void read(const smartkv::KernelTable& kernels, int64_t head, int t, int64_t page_index, Dense& k,
            Dense& v) {
    smartkv::DequantizeParams p{};
    p.pages = page(head, t, page_index * smartkv::PAGE_SIZE);
    p.page_bytes = page_bytes(t);
    p.k_mean = k_mean.data() + head * head_dim;
    p.k = k.bytes.data();
    p.v = v.bytes.data();
    p.dtype = k.dtype;
    p.batch = p.num_kv_heads = 1;
    p.head_dim = head_dim;
    p.tier = bits[t];
    p.num_pages = 1;
    p.levels = levels;
    p.turns = turns.view(head);
    kernels.dequantize_kv(p, parallel());
  }
};

inline std::vector<const smartkv::KernelTable*> all_kernels() {
  std::vector<const smartkv::KernelTable*> sets;
  for (const std::string& name : smartkv::available_kernel_sets()) {
    sets.push_back(&smartkv::kernel_set(name));
  }
  return sets;
}

// Relative to the largest value, or absolute for small ones.
inline bool is_close(double x, double y, double tolerance) {
  if (std::isinf(y) || std::isinf(x)) return x == y;
  return std::fabs(x - y) <= tolerance * (1 + std::fabs(y));
}

}  // namespace testing

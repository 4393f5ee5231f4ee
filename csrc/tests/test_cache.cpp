// quantize_kv, dequantize_kv, append_kv and compact_kv in every kernel set.
#include "testing.h"

using namespace smartkv;
using testing::Cache;
using testing::Dense;

namespace {

std::vector<uint8_t> quantize(const KernelTable& kernels, const Dense& k, const Dense& v,
                              const std::vector<float>& k_mean, int tier, Levels levels,
                              int threads) {
  const int64_t heads = int64_t{k.batch} * k.heads, pages = (k.n + PAGE_SIZE - 1) / PAGE_SIZE;
  const PageLayout layout = page_layout(tier, k.head_dim, dtype_size(k.dtype));
  // Whatever was there before: every byte of a page is written.
  std::vector<uint8_t> out(heads * pages * layout.page_bytes,
                           static_cast<uint8_t>(testing::random_int(0, 255)));
  std::vector<int32_t> positions(heads * k.n);
  std::vector<float> scores(heads * k.n);
  for (size_t i = 0; i < positions.size(); ++i) {
    positions[i] = static_cast<int32_t>(i);
    scores[i] = 1.0f / static_cast<float>(i + 1);
  }
  kernels.quantize_kv(
      {k.view(), v.view(), k_mean.data(), positions.data(), scores.data(), out.data(),
       layout.page_bytes, k.batch, k.heads, k.head_dim, tier, k.n, levels},
      testing::parallel(threads));
  return out;
}

// Relative squared error of what dequantize_kv gives back.
double round_trip_error(const KernelTable& kernels, const Dense& k, const Dense& v,
                        std::vector<float>& k_mean, int tier, Levels levels) {
  std::vector<uint8_t> pages = quantize(kernels, k, v, k_mean, tier, levels, 2);
  const int64_t num_pages = (k.n + PAGE_SIZE - 1) / PAGE_SIZE;
  Dense k_out(k.dtype, k.batch, k.heads, num_pages * PAGE_SIZE, k.head_dim), v_out = k_out;
  const PageLayout layout = page_layout(tier, k.head_dim, dtype_size(k.dtype));
  kernels.dequantize_kv(
      {pages.data(), layout.page_bytes, k_mean.data(), k_out.bytes.data(), v_out.bytes.data(),
       k.dtype, k.batch, k.heads, k.head_dim, tier, num_pages, levels},
      testing::parallel(3));
  double error = 0, power = 0;
  for (int b = 0; b < k.batch; ++b) {
    for (int h = 0; h < k.heads; ++h) {
      for (int64_t i = 0; i < k.n * k.head_dim; ++i) {
        const int64_t in = k.index(b, h, 0) + i, out = k_out.index(b, h, 0) + i;
        const double mean = k_mean[(b * k.heads + h) * k.head_dim + i % k.head_dim];
        error += std::pow(k.get(in) - k_out.get(out), 2) + std::pow(v.get(in) - v_out.get(out), 2);
        power += std::pow(k.get(in) - mean, 2) + std::pow(v.get(in), 2);
      }
    }
  }
  return error / power;
}

double error_bound(int bits, Levels levels) {
  const bool gaussian = levels == Levels::GAUSSIAN;
  return bits == 2   ? gaussian ? 0.13 : 0.45
         : bits == 3 ? gaussian ? 0.04 : 0.08
         : bits == 4 ? gaussian ? 0.012 : 0.02
         : bits == 8 ? 2e-4
                     : 0.0;
}

void test_quantize(int head_dim, DType dtype) {
  Dense k(dtype, 2, 2, 130, head_dim), v = k;
  k.fill_normal();
  v.fill_normal();
  for (int c = 0; c < head_dim; ++c) v.set(c, 0);  // a token of zeros must not divide by zero
  std::vector<float> k_mean = testing::normals(4 * head_dim);
  for (Levels levels : {Levels::UNIFORM, Levels::GAUSSIAN}) {
    for (int tier : TIERS) {
      const auto sets = testing::all_kernels();
      const std::vector<uint8_t> expected = quantize(*sets[0], k, v, k_mean, tier, levels, 1);
      for (const KernelTable* kernels : sets) {
        CHECK(quantize(*kernels, k, v, k_mean, tier, levels, 3) == expected,
              "%s: tier %d, head_dim %d", kernels->name, tier, head_dim);
        // Gaussian quantisers leave 0.1175, 0.0345, 0.0095; uniform ones somewhat more.
        const double bound =
            (error_bound(k_bits_of(tier), levels) + error_bound(v_bits_of(tier), levels)) / 2;
        const double error = round_trip_error(*kernels, k, v, k_mean, tier, levels);
        CHECK(error <= bound, "%s: tier %d, head_dim %d: error %g", kernels->name, tier, head_dim,
              error);
      }
    }
  }
}

// Appending tokens one tier at a time must give the bytes of quantize_kv.
void test_append(const KernelTable& kernels, int head_dim, DType dtype) {
  const std::vector<int> bits(std::begin(TIERS), std::end(TIERS));
  Cache cache(bits, 1, 2, head_dim, 3, dtype, Levels::GAUSSIAN);
  Dense k(dtype, 1, 2, 150, head_dim), v = k;
  k.fill_normal();
  v.fill_normal();
  std::vector<int8_t> tiers(300);
  for (int8_t& t : tiers) t = static_cast<int8_t>(testing::random_int(-1, MAX_TIERS - 1));
  cache.append(kernels, k, v, tiers, 1000, 2);
  for (int h = 0; h < 2; ++h) {
    std::vector<int> counts(MAX_TIERS);
    for (int i = 0; i < 150; ++i) {
      const int t = tiers[h * 150 + i];
      if (t < 0) continue;
      CHECK(cache.position(h, t, counts[t]++) == 1000 + i);
    }
    for (int t = 0; t < MAX_TIERS; ++t) CHECK(cache.length(h, t) == counts[t]);
  }
  Dense row_k(dtype, 1, 1, 64, head_dim), row_v = row_k, one_k(dtype, 1, 1, 1, head_dim),
                                          one_v = one_k;
  for (int t = 0; t < MAX_TIERS; ++t) {
    cache.read(kernels, 1, t, 0, row_k, row_v);
    const int first = static_cast<int>(
        std::find(tiers.begin() + 150, tiers.end(), static_cast<int8_t>(t)) - tiers.begin() - 150);
    for (int c = 0; c < head_dim; ++c) {
      one_k.set(c, k.get(k.index(0, 1, first) + c));
      one_v.set(c, v.get(v.index(0, 1, first) + c));
    }
    const std::vector<float> mean(cache.k_mean.begin() + head_dim, cache.k_mean.end());
    std::vector<uint8_t> page = quantize(kernels, one_k, one_v, mean, bits[t], cache.levels, 1);
    Dense page_k = row_k, page_v = row_v;
    kernels.dequantize_kv({page.data(), cache.page_bytes(t), mean.data(), page_k.bytes.data(),
                           page_v.bytes.data(), dtype, 1, 1, head_dim, bits[t], 1, cache.levels},
                          testing::parallel());
    for (int c = 0; c < head_dim; ++c) {
      CHECK(page_k.get(c) == row_k.get(c) && page_v.get(c) == row_v.get(c));
    }
  }
}

// What compact_kv promises, on lists of positions.
std::vector<std::vector<int>> compact_model(const std::vector<std::vector<int>>& tiers,
                                            const std::vector<std::vector<int8_t>>& targets) {
  const int num_tiers = static_cast<int>(tiers.size());
  std::vector<std::vector<int>> result(num_tiers);
  for (int t = 0; t < num_tiers; ++t) {
    std::vector<int> records = tiers[t];
    int low = 0, high = static_cast<int>(records.size()) - 1;
    while (low <= high) {
      if (targets[t][low] == t) {
        ++low;
      } else if (targets[t][high] != t) {
        --high;
      } else {
        records[low++] = records[high--];
      }
    }
    records.resize(low);
    for (int s = num_tiers - 1; s > t; --s) {
      for (size_t i = 0; i < tiers[s].size(); ++i) {
        if (targets[s][i] == t) records.push_back(tiers[s][i]);
      }
    }
    result[t] = records;
  }
  return result;
}

void test_compact(const KernelTable& kernels, int head_dim, DType dtype, int keep_percent) {
  Cache cache({std::begin(TIERS), std::end(TIERS)}, 1, 2, head_dim, 5, dtype, Levels::GAUSSIAN, 4);
  Dense k(dtype, 1, 2, 200, head_dim), v = k;
  k.fill_normal();
  v.fill_normal();
  std::vector<int8_t> tiers(400);
  for (int8_t& t : tiers) t = static_cast<int8_t>(testing::random_int(0, MAX_TIERS - 1));
  cache.append(kernels, k, v, tiers, 0);
  const int64_t capacity = cache.max_pages * PAGE_SIZE;
  std::vector<int8_t> flat(2 * MAX_TIERS * capacity, 77);
  std::vector<std::vector<std::vector<int>>> expected;
  for (int h = 0; h < 2; ++h) {
    std::vector<std::vector<int>> records(MAX_TIERS);
    std::vector<std::vector<int8_t>> targets(MAX_TIERS);
    for (int t = 0; t < MAX_TIERS; ++t) {
      for (int i = 0; i < cache.length(h, t); ++i) {
        records[t].push_back(cache.position(h, t, i));
        const bool keep = testing::random_int(0, 99) < keep_percent;
        targets[t].push_back(static_cast<int8_t>(keep ? t : testing::random_int(-1, t)));
        flat[(h * MAX_TIERS + t) * capacity + i] = targets[t].back();
      }
    }
    expected.push_back(compact_model(records, targets));
  }
  kernels.compact_kv({cache.view(), flat.data()}, testing::parallel(2));
  Dense page_k(dtype, 1, 1, 64, head_dim), page_v = page_k;
  for (int h = 0; h < 2; ++h) {
    for (int t = 0; t < MAX_TIERS; ++t) {
      CHECK(cache.length(h, t) == static_cast<int>(expected[h][t].size()));
      for (int i = 0; i < cache.length(h, t); ++i) {
        CHECK(cache.position(h, t, i) == expected[h][t][i]);
        if (i % PAGE_SIZE == 0) cache.read(kernels, h, t, i / PAGE_SIZE, page_k, page_v);
        // The values must belong to the token: correlation with the original V.
        double dot = 0, a = 0, b = 0;
        for (int c = 0; c < head_dim; ++c) {
          const double x = page_v.get(i % PAGE_SIZE * head_dim + c);
          const double y = v.get(v.index(0, h, expected[h][t][i]) + c);
          dot += x * y;
          a += x * x;
          b += y * y;
        }
        CHECK(dot > 0.8 * std::sqrt(a * b), "%s: head_dim %d, tier %d, record %d", kernels.name,
              head_dim, t, i);
      }
    }
  }
}

// A step down leaves what has the bits already as it was, to the last bit.
void test_equal_bits(const KernelTable& kernels, int head_dim) {
  const std::vector<int> bits = {2, 302, 3, 403, 4};
  const int num_tiers = static_cast<int>(bits.size());
  for (int from = 1; from < num_tiers; ++from) {
    Cache cache(bits, 1, 1, head_dim, 2, DType::BFLOAT16, Levels::GAUSSIAN);
    Dense k(DType::BFLOAT16, 1, 1, 64, head_dim), v = k;
    k.fill_normal();
    v.fill_normal();
    cache.append(kernels, k, v, std::vector<int8_t>(64, static_cast<int8_t>(from)), 0);
    Dense k_before(DType::BFLOAT16, 1, 1, 64, head_dim), v_before = k_before;
    cache.read(kernels, 0, from, 0, k_before, v_before);
    const int64_t capacity = cache.max_pages * PAGE_SIZE;
    std::vector<int8_t> targets(num_tiers * capacity, -1);
    std::fill_n(targets.begin() + from * capacity, 64, static_cast<int8_t>(from - 1));
    kernels.compact_kv({cache.view(), targets.data()}, testing::parallel());
    CHECK(cache.length(0, from - 1) == 64 && cache.length(0, from) == 0);
    Dense k_after = k_before, v_after = k_before;
    cache.read(kernels, 0, from - 1, 0, k_after, v_after);
    const bool same_k = k_bits_of(bits[from]) == k_bits_of(bits[from - 1]);
    const bool same_v = v_bits_of(bits[from]) == v_bits_of(bits[from - 1]);
    CHECK(same_k != same_v);
    CHECK((k_after.bytes == k_before.bytes) == same_k, "%s: head_dim %d, from %d", kernels.name,
          head_dim, bits[from]);
    CHECK((v_after.bytes == v_before.bytes) == same_v, "%s: head_dim %d, from %d", kernels.name,
          head_dim, bits[from]);
  }
}

}  // namespace

int main() {
  const DType dtypes[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};
  int turn = 0;
  for (int head_dim : HEAD_DIMS) {
    test_quantize(head_dim, dtypes[turn++ % 3]);
    for (const KernelTable* kernels : testing::all_kernels()) {
      test_append(*kernels, head_dim, dtypes[turn % 3]);
      for (int keep : {0, 40, 100}) test_compact(*kernels, head_dim, dtypes[turn % 3], keep);
      test_equal_bits(*kernels, head_dim);
      ++turn;
    }
  }
  return testing::report("cache");
}

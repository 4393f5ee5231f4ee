// quantize_kv, dequantize_kv, append_kv and compact_kv on the shim: the bytes of the CPU kernels.
#include "cuda_table.h"

using namespace smartkv;
using testing::Cache;
using testing::Dense;

namespace {

constexpr DType DTYPES[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};
constexpr int NUM_SEEDS = 2;

const KernelTable CUDA = testing::cuda_table();

struct Labels {
  std::vector<int32_t> positions;
  std::vector<float> scores;

  explicit Labels(int64_t count) : positions(count), scores(testing::normals(count)) {
    for (int64_t i = 0; i < count; ++i) positions[i] = static_cast<int32_t>(7 * i % 1000);
  }
};

void test_pages(int head_dim, DType dtype, int64_t n, Levels levels) {
  Dense k(dtype, 2, 2, n, head_dim), v = k;
  k.fill_normal();
  v.fill_normal(3);
  if (n > 2) {
    for (int c = 0; c < head_dim; ++c) k.set(k.index(1, 1, 2) + c, 0);
    for (int c = 0; c < head_dim; ++c) v.set(v.index(0, 0, 1) + c, 0);
  }
  const Labels labels(4 * n);
  const std::vector<float> mean = testing::normals(4 * head_dim);
  const int64_t num_pages = (n + PAGE_SIZE - 1) / PAGE_SIZE;
  for (int bits : TIERS) {
    const testing::TurningMeans turns(bits % (MAX_TURNS + 1), 2, 2, head_dim);  // 2, 5, 3, 7, 4, 8
    const PageLayout layout = page_layout(bits, head_dim, dtype_size(dtype));
    std::vector<uint8_t> expected(4 * num_pages * layout.page_bytes, 0x55);
    QuantizeParams p{k.view(),
                     v.view(),
                     mean.data(),
                     labels.positions.data(),
                     labels.scores.data(),
                     expected.data(),
                     layout.page_bytes,
                     2,
                     2,
                     head_dim,
                     bits,
                     n,
                     levels,
                     turns.view()};
    cpu_kernels().quantize_kv(p, testing::parallel());
    Dense k_out(dtype, 2, 2, num_pages * PAGE_SIZE, head_dim), v_out = k_out;
    DequantizeParams back{expected.data(),
                          layout.page_bytes,
                          mean.data(),
                          k_out.bytes.data(),
                          v_out.bytes.data(),
                          dtype,
                          2,
                          2,
                          head_dim,
                          bits,
                          num_pages,
                          levels,
                          turns.view()};
    cpu_kernels().dequantize_kv(back, testing::parallel());
    for (int seed = 0; seed < NUM_SEEDS; ++seed) {
      simt::set_seed(seed);
      std::vector<uint8_t> pages(expected.size(), 0xff);
      p.pages = pages.data();
      CUDA.quantize_kv(p, testing::parallel());
      CHECK(pages == expected, "%d bits, head_dim %d, seed %d", bits, head_dim, seed);
      Dense k_cuda(k_out), v_cuda(k_out);
      back.k = k_cuda.bytes.data();
      back.v = v_cuda.bytes.data();
      CUDA.dequantize_kv(back, testing::parallel());
      CHECK(k_cuda.bytes == k_out.bytes && v_cuda.bytes == v_out.bytes,
            "%d bits, head_dim %d, seed %d", bits, head_dim, seed);
    }
  }
}

// A vector with a NaN must not come back as a finite one where the CPU's does not.
void test_nan_vectors(Levels levels) {
  Dense k(DType::FLOAT32, 1, 1, 5, 64), v = k;
  k.fill_normal();
  v.fill_normal();
  k.set(k.index(0, 0, 1) + 3, NAN);
  v.set(v.index(0, 0, 3) + 3, NAN);
  const Labels labels(5);
  const std::vector<float> mean(64);
  for (int bits : TIERS) {
    const PageLayout layout = page_layout(bits, 64, 4);
    Dense got[2][2] = {{{k.dtype, 1, 1, PAGE_SIZE, 64}, {k.dtype, 1, 1, PAGE_SIZE, 64}},
                       {{k.dtype, 1, 1, PAGE_SIZE, 64}, {k.dtype, 1, 1, PAGE_SIZE, 64}}};
    for (int i = 0; i < 2; ++i) {
      const KernelTable& kernels = i == 0 ? cpu_kernels() : CUDA;
      std::vector<uint8_t> page(layout.page_bytes);
      kernels.quantize_kv(
          {k.view(), v.view(), mean.data(), labels.positions.data(), labels.scores.data(),
           page.data(), layout.page_bytes, 1, 1, 64, bits, 5, levels},
          testing::parallel());
      kernels.dequantize_kv({page.data(), layout.page_bytes, mean.data(), got[i][0].bytes.data(),
                             got[i][1].bytes.data(), k.dtype, 1, 1, 64, bits, 1, levels},
                            testing::parallel());
    }
    for (int part = 0; part < 2; ++part) {
      for (int64_t at = 0; at < 5 * 64; ++at) {
        const float cpu = got[0][part].get(at), cuda = got[1][part].get(at);
        CHECK(cpu == cuda || (std::isnan(cpu) && std::isnan(cuda)), "%d bits: %g, not %g", bits,
              cuda, cpu);
      }
    }
    CHECK(std::isnan(got[1][0].get(64 + 3)), "%d bits", bits);
  }
}

std::vector<int8_t> random_tiers(int64_t count, int low, int high) {
  std::vector<int8_t> tiers(count);
  for (int8_t& t : tiers) t = static_cast<int8_t>(testing::random_int(low, high));
  return tiers;
}

void append(const KernelTable& kernels, Cache& cache, const Dense& rows,
            const std::vector<int8_t>& tiers, const Labels& labels) {
  kernels.append_kv({cache.view(), rows.view(), rows.view(), labels.positions.data(),
                     labels.scores.data(), tiers.data(), rows.n},
                    testing::parallel());
}

void test_append_and_compact(int head_dim, DType dtype, std::vector<int> bits, int keep_percent) {
  const int num_tiers = static_cast<int>(bits.size());
  Cache by_cpu(std::move(bits), 1, 2, head_dim, 4, dtype, Levels::GAUSSIAN,
               keep_percent == 0 ? 0 : 3);
  Cache first = by_cpu;
  std::vector<Dense> rows;
  std::vector<std::vector<int8_t>> tiers;
  for (int64_t n : {150, 1, 64}) {
    rows.emplace_back(dtype, 1, 2, n, head_dim);
    rows.back().fill_normal();
    tiers.push_back(random_tiers(2 * n, -1, num_tiers - 1));
  }
  const Labels labels(300);
  for (int i = 0; i < 3; ++i) append(cpu_kernels(), by_cpu, rows[i], tiers[i], labels);
  const int64_t capacity = by_cpu.max_pages * PAGE_SIZE;
  std::vector<int8_t> targets(2 * num_tiers * capacity, 77);
  for (int64_t list = 0; list < 2 * num_tiers; ++list) {
    for (int64_t i = 0; i < by_cpu.seqlens[list]; ++i) {
      const int tier = static_cast<int>(list % num_tiers);
      const bool stays = testing::random_int(0, 99) < keep_percent;
      targets[list * capacity + i] =
          static_cast<int8_t>(stays ? tier : testing::random_int(-1, tier));
    }
  }
  Cache compacted = by_cpu;
  cpu_kernels().compact_kv({compacted.view(), targets.data()}, testing::parallel());
  for (int seed = 0; seed < NUM_SEEDS; ++seed) {
    simt::set_seed(seed);
    Cache cache = first;
    for (int i = 0; i < 3; ++i) append(CUDA, cache, rows[i], tiers[i], labels);
    CHECK(cache.pools == by_cpu.pools && cache.seqlens == by_cpu.seqlens, "append: head_dim %d",
          head_dim);
    // As torch aligns them, and not.
    std::vector<int8_t> shifted(targets.size() + seed);
    std::copy(targets.begin(), targets.end(), shifted.begin() + seed);
    CUDA.compact_kv({cache.view(), shifted.data() + seed}, testing::parallel());
    CHECK(cache.pools == compacted.pools && cache.seqlens == compacted.seqlens,
          "compact: head_dim %d, keep %d", head_dim, keep_percent);
  }
}

// Half of the records of the lower tier go; the upper one has no pages at all.
void test_compact_without_pages() {
  Cache by_cpu({3, 8}, 1, 2, 64, 4, DType::BFLOAT16, Levels::GAUSSIAN);
  Dense rows(DType::BFLOAT16, 1, 2, 200, 64);
  rows.fill_normal();
  append(cpu_kernels(), by_cpu, rows, std::vector<int8_t>(400), Labels(400));
  Cache cache = by_cpu;
  std::vector<int8_t> targets(4 * by_cpu.max_pages * PAGE_SIZE);
  for (size_t i = 0; i < targets.size(); ++i) targets[i] = i % 3 == 0 ? -1 : 0;
  cpu_kernels().compact_kv({by_cpu.view(), targets.data()}, testing::parallel());
  PagedKV view = cache.view();
  view.num_pages[1] = 0;
  view.pools[1] = nullptr;
  CUDA.compact_kv({view, targets.data()}, testing::parallel());
  CHECK(cache.pools == by_cpu.pools && cache.seqlens == by_cpu.seqlens, "a tier without pages");
}

}  // namespace

int main() {
  int turn = 0;
  for (int head_dim : HEAD_DIMS) {
    for (int64_t n : {1, 65}) {
      test_pages(head_dim, DTYPES[turn % 3], n, turn % 2 ? Levels::UNIFORM : Levels::GAUSSIAN);
      ++turn;
    }
    test_append_and_compact(head_dim, DTYPES[turn % 3], {std::begin(TIERS), std::end(TIERS)}, 50);
  }
  test_nan_vectors(Levels::GAUSSIAN);
  test_nan_vectors(Levels::UNIFORM);
  test_append_and_compact(64, DType::BFLOAT16, {4}, 0);
  test_compact_without_pages();
  test_append_and_compact(64, DType::BFLOAT16, {3, 16}, 100);
  return testing::report("test_simt_cache");
}

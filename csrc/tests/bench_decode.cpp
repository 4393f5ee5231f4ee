// Times decode_attention over a packed cache: us per call and GB/s of packed bytes.
//
// bench_decode [bits=4] [kv_len=32768] [q_len=1] [threads=2] [head_dim=128] [mass=0] [precision=0]
// [copies] [calls=30] 32 query heads, 8 kv heads, batch 1, bf16. Several copies of the cache are
// visited in turn, so that the data come from memory. The last line is JSON.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "smartkv/isa.h"
#include "smartkv/layout.h"

using namespace smartkv;

namespace {

constexpr int NUM_HEADS = 32, NUM_KV_HEADS = 8;
int num_threads = 2;

void run_threads(int64_t count, void* context, void (*fn)(void*, int64_t, int64_t)) {
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) {
    threads.emplace_back(fn, context, count * i / num_threads, count * (i + 1) / num_threads);
  }
  fn(context, 0, count / num_threads);
  for (std::thread& thread : threads) thread.join();
}

// Memory on 2 MB pages where the system grants them.
class Pool {
 public:
  explicit Pool(size_t bytes) : bytes_((bytes + HUGE - 1) / HUGE * HUGE) {
    data_ = static_cast<uint8_t*>(std::aligned_alloc(HUGE, bytes_));
#if defined(__linux__)
    if (!std::getenv("SMALL_PAGES")) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Pool() { std::free(data_); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t HUGE = size_t{2} << 20;
  size_t bytes_;
  uint8_t* data_;
};

struct Cache {
  Pool pool;
  std::vector<int32_t> table, seqlens;
  std::vector<float> k_mean;
  PagedKV view{};

  Cache(const PageLayout& layout, int64_t pages, int copies)
      : pool(pages * copies * layout.page_bytes) {
    const int head_dim = layout.head_dim;
    uint8_t* base = pool.data();
    std::mt19937_64 random(7);
    for (size_t i = 0; i + 8 <= pool.size(); i += 8) {
      const uint64_t x = random();
      std::memcpy(pool.data() + i, &x, 8);
    }
    for (int64_t page = 0; page < pages * copies; ++page) label_page(base, layout, page, pages);
    for (int64_t i = 0; i < pages; ++i) table.push_back(static_cast<int32_t>(i));
    seqlens.assign(NUM_KV_HEADS, static_cast<int32_t>(pages / NUM_KV_HEADS * PAGE_SIZE));
    k_mean.assign(NUM_KV_HEADS * head_dim, 0.01f);
    view.pools[0] = base;
    view.page_bytes[0] = layout.page_bytes;
    view.tier_bits[0] = layout.tier;
    view.num_tiers = 1;
    view.block_table = table.data();
    view.cache_seqlens = seqlens.data();
    view.max_pages = pages / NUM_KV_HEADS;
    view.k_mean = k_mean.data();
    view.batch = 1;
    view.num_kv_heads = NUM_KV_HEADS;
    view.head_dim = head_dim;
    view.raw_dtype = DType::BFLOAT16;
    view.levels = Levels::GAUSSIAN;
  }

  static void label_page(uint8_t* base, const PageLayout& layout, int64_t page, int64_t pages) {
    uint8_t* at = base + page * layout.page_bytes;
    for (int s = 0; s < PAGE_SIZE; ++s) {
      const auto position = static_cast<int32_t>(page % (pages / NUM_KV_HEADS) * PAGE_SIZE + s);
      std::memcpy(at + layout.position + 4 * s, &position, 4);
      const uint16_t scale = 0x2000;  // about 0.008
      if (layout.is_raw()) continue;
      std::memcpy(at + layout.k_scale + 2 * s, &scale, 2);
      std::memcpy(at + layout.v_scale + 2 * s, &scale, 2);
    }
    if (!layout.is_raw()) return;
    for (int64_t i = 0; i < layout.position; i += 2) at[i + 1] = (at[i + 1] & 0x80) | 0x3e;
  }
};

// Reads every byte once, on all threads: the floor.
struct Reader {
  const uint8_t* data;
  uint64_t sums[64] = {};

  static void run(void* context, int64_t begin, int64_t end) {
    auto& self = *static_cast<Reader*>(context);
    uint64_t sum[8] = {};
    for (int64_t i = begin; i + 64 <= end; i += 64) {
      __builtin_prefetch(self.data + i + 4096);
      uint64_t line[8];
      std::memcpy(line, self.data + i, sizeof line);
      for (int j = 0; j < 8; ++j) sum[j] += line[j];
    }
    for (uint64_t x : sum) __atomic_fetch_add(self.sums, x, __ATOMIC_RELAXED);
  }
};

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const int bits = argument(1, 4), kv_len = argument(2, 32768), q_len = argument(3, 1);
  num_threads = argument(4, 2);
  const int head_dim = argument(5, 128);
  const bool with_mass = argument(6, 0) != 0;
  const int precision = argument(7, 0);
  const PageLayout layout = page_layout(bits, head_dim);
  const int64_t pages = (kv_len + PAGE_SIZE - 1) / PAGE_SIZE * NUM_KV_HEADS;
  const int64_t bytes = layout.page_bytes * pages;
  const int copies =
      argument(8, static_cast<int>(std::clamp<int64_t>((int64_t{256} << 20) / bytes, 1, 16)));
  Cache cache(layout, pages, copies);
  std::vector<uint16_t> q(static_cast<size_t>(NUM_HEADS) * q_len * head_dim), out(q.size());
  std::mt19937 random(1);
  for (uint16_t& x : q) x = static_cast<uint16_t>(0x3f00 | (random() & 0x80ff));
  std::vector<float> lse(static_cast<size_t>(NUM_HEADS) * q_len);
  std::vector<float> mass(cache.view.max_pages * PAGE_SIZE * NUM_KV_HEADS);
  DecodeAttentionParams p{};
  p.cache = cache.view;
  p.q = {q.data(), DType::BFLOAT16, int64_t{NUM_HEADS} * q_len * head_dim,
         int64_t{q_len} * head_dim, head_dim};
  p.k_window = p.v_window = {nullptr, DType::BFLOAT16, 0, 0, 0};
  p.out = out.data();
  p.lse = lse.data();
  p.mass = with_mass ? mass.data() : nullptr;
  p.num_heads = NUM_HEADS;
  p.q_len = q_len;
  const int64_t q_start = kv_len;
  p.q_start = &q_start;
  p.softmax_scale = 0.088f;
  p.precision = static_cast<Precision>(precision);
  const Parallel parallel{run_threads, num_threads};
  const auto seconds = [](const auto& body) {
    const auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::vector<double> times, reads;
  const int calls = argument(9, 30);
  for (int i = 0; i < calls + 3; ++i) {
    p.cache.pools[0] = cache.view.pools[0] + i % copies * bytes;
    const double call = seconds([&] { cpu_kernels().decode_attention(p, parallel); });
    Reader reader{cache.view.pools[0] + (i + copies / 2) % copies * bytes};
    const double read = seconds([&] { run_threads(bytes, &reader, Reader::run); });
    if (i < 3) continue;
    times.push_back(call);
    reads.push_back(read);
  }
  const double us = median(times) * 1e6, floor_us = median(reads) * 1e6;
  std::printf(
      "{\"isa\": \"%s\", \"bits\": %d, \"kv_len\": %d, \"q_len\": %d, \"threads\": %d, "
      "\"head_dim\": %d, \"mass\": %d, \"precision\": %d, \"us\": %.1f, \"min_us\": %.1f, "
      "\"GB/s\": %.2f, \"read_us\": %.1f, \"floor_ratio\": %.2f}\n",
      kernel_set_name(), bits, kv_len, q_len, num_threads, head_dim, with_mass, precision, us,
      *std::min_element(times.begin(), times.end()) * 1e6, static_cast<double>(bytes) / us * 1e-3,
      floor_us, us / floor_us);
}

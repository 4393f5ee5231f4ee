// decode_attention and attention_mass against plain double precision.
#include "attention_plan.h"
#include "attention_problem.h"
#include "kernel_prelude.h"
#include "not_finite.h"

#define SMARTKV_ISA fetching
// clang-format off: feed.h uses simd.h
#include "simd.h"
#include "feed.h"
// clang-format on

using namespace smartkv;

namespace {

constexpr Precision PRECISIONS[] = {Precision::FLOAT32, Precision::INT16, Precision::INT8,
                                    Precision::AUTO};

void test_decode() {
  const DType dtypes[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};
  const int threads[] = {1, 2, 3, 7};
  int turn = 0;
  for (int head_dim : HEAD_DIMS) {
    for (int bits : TIERS) {
      for (int64_t q_len : {1, 2, 3, 9}) {
        const DType dtype = dtypes[turn % 3];
        const int64_t window = turn % 4 == 0 ? 0 : turn % 4 == 1 ? 70 : 13;
        const int64_t sliding = turn % 3 == 1 ? 40 : 0;
        const Levels levels = turn % 2 ? Levels::GAUSSIAN : Levels::UNIFORM;
        const int64_t q_start = turn % 5 == 0 ? 60 : 140;  // 60: some records lie in the future
        const Case c{1, 2, 1 + turn % 4, head_dim, dtype, q_len, window, q_start, sliding};
        Problem problem(c, {bits}, {130, turn % 2 ? 63 : 64}, levels, 4, turn % (MAX_TURNS + 1));
        for (const KernelTable* kernels : testing::all_kernels()) {
          for (Precision precision : PRECISIONS) {
            check_decode(problem, *kernels, threads[turn % 4], turn % 2 == 0, precision);
          }
        }
        ++turn;
      }
    }
  }
}

void test_mixed_tiers() {
  for (int threads : {1, 2, 3, 7}) {
    for (int64_t q_len : {1, 5, 40}) {
      const Case c{2, 2, 3, 128, DType::FLOAT32, q_len, 75, 150, threads == 2 ? 64 : 0};
      Problem problem(c, {std::begin(TIERS), std::end(TIERS)}, {0, 1, 63, 64, 65, 130},
                      Levels::GAUSSIAN);
      for (const KernelTable* kernels : testing::all_kernels()) {
        for (Precision precision : PRECISIONS) {
          check_decode(problem, *kernels, threads, true, precision);
        }
      }
    }
  }
  // Nothing at all to see, and no tiers.
  Problem empty({1, 2, 2, 64, DType::BFLOAT16, 3, 0, 5, 0}, {4}, {0}, Levels::GAUSSIAN);
  Problem dense({1, 1, 4, 96, DType::FLOAT16, 7, 200, 90, 0}, {}, {0}, Levels::GAUSSIAN);
  for (const KernelTable* kernels : testing::all_kernels()) {
    check_decode(empty, *kernels, 2, true);
    check_decode(dense, *kernels, 3, true);
  }
}

// Groups of five to eight query heads: one pass over the codes serves them all.
void test_wide_groups() {
  for (int groups : {5, 6, 7, 8}) {
    for (int bits : TIERS) {
      const Case c{1, 2, groups, groups % 2 ? 64 : 128, DType::BFLOAT16, 1, 13, 140, 0};
      Problem problem(c, {bits}, {130, 63}, Levels::GAUSSIAN);
      for (const KernelTable* kernels : testing::all_kernels()) {
        for (Precision precision : PRECISIONS) {
          check_decode(problem, *kernels, 3, true, precision);
        }
      }
    }
  }
}

// What is fetched ahead is what will be read: the pages of a part in the order of its tiles.
void test_page_walk() {
  const Case c{2, 2, 3, 64, DType::FLOAT16, 1, 75, 150, 0};
  Problem problem(c, {2, 4, 16}, {0, 1, 64, 65, 130}, Levels::GAUSSIAN);
  const DecodeAttentionParams p = problem.params();
  for (int64_t parts : {1, 2, 3, 7, 40}) {
    const AttentionPlan plan(p, parts);
    for (int64_t part = 0; part < parts; ++part) {
      const Piece* begin = plan.pieces + plan.part_begin[part];
      const Piece* end = plan.pieces + plan.part_begin[part + 1];
      PageWalk walk(p, begin, end);
      for (const Piece* piece = begin; piece != end; ++piece) {
        for (int64_t i = piece->begin; i < piece->end; ++i) {
          const TileRef tile = tile_at(p, piece->head, i);
          if (tile.tier == p.cache.num_tiers) continue;
          const int64_t list = piece->head * p.cache.num_tiers + tile.tier;
          const int32_t page = p.cache.block_table[list * p.cache.max_pages + tile.index];
          const int64_t bytes = p.cache.page_bytes[tile.tier];
          const PageRef next = walk.next();
          CHECK(next.page == p.cache.pools[tile.tier] + page * bytes && next.bytes == bytes,
                "part %d of %d, tile %d: another page", static_cast<int>(part),
                static_cast<int>(parts), static_cast<int>(i));
        }
      }
      CHECK(walk.next().page == nullptr, "part %d of %d: too many pages", static_cast<int>(part),
            static_cast<int>(parts));
    }
  }
}

// A sliding window passes over most pages: memory must not be asked for them.
void test_passed_pages_are_not_fetched() {
  const Case c{1, 1, 1, 128, DType::FLOAT32, 1, 0, 500, 40};
  Problem problem(c, {4}, {500}, Levels::GAUSSIAN, 8);
  const DecodeAttentionParams p = problem.params();
  const AttentionPlan plan(p, 1);
  const auto page_of = [&](const uint8_t* at) {
    const int64_t id = (at - p.cache.pools[0]) / p.cache.page_bytes[0];
    return std::find(p.cache.block_table, p.cache.block_table + 8, id) - p.cache.block_table;
  };
  const uint8_t nothing = 0;
  fetching::Feed feed(p, plan.pieces, plan.pieces + 1, 1, plan.bytes_per_cost);
  for (int i = 0; i < 6; ++i) feed.pass(0);
  feed.open(0);
  feed.begin(2);
  for (int product = 0; product < 2; ++product) {
    const auto page = page_of(feed.take(64, &nothing).at);
    CHECK(page == 6 || page == 7, "product %d fetches page %d", product, static_cast<int>(page));
  }
  for (int i = 0; i < 9; ++i) feed.pass(0);  // more than there are
  CHECK(feed.take(64, &nothing).at == &nothing, "%s", "something behind the last page is fetched");
}

void test_not_finite() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    for (Precision precision : PRECISIONS) check_not_finite(*kernels, precision);
  }
}

// A token of large values without attention must not cost the others their digits.
void test_uneven_values() {
  const Case c{1, 1, 2, 64, DType::FLOAT32, 1, 0, 400, 0};
  for (int bits : {2, 4, 8}) {
    Problem problem(c, {bits}, {128}, Levels::GAUSSIAN);
    for (int i : {20, 90}) {
      uint8_t* page = problem.cache.page(0, 0, i);
      const PageLayout layout = problem.cache.layout(0);
      uint16_t scale;
      std::memcpy(&scale, page + layout.v_scale + i % 64 * 2, 2);
      scale = static_cast<uint16_t>(scale + (9 << 10));  // 512 times as large
      std::memcpy(page + layout.v_scale + i % 64 * 2, &scale, 2);
      const int32_t future = 1000;
      std::memcpy(page + layout.position + i % 64 * 4, &future, 4);
    }
    problem.keys[0] = {};
    problem.collect_keys(0);
    for (const KernelTable* kernels : testing::all_kernels()) {
      for (Precision precision : PRECISIONS) {
        Dense out(c.dtype, 1, 2, 1, 64);
        float lse[2];
        DecodeAttentionParams p = problem.params();
        p.out = out.bytes.data();
        p.lse = lse;
        p.precision = precision;
        kernels->decode_attention(p, testing::parallel(1));
        const Oracle expected = attend(c, problem.keys[0], problem.q, 0, 0, SOFTMAX_SCALE);
        double error = 0, power = 0;
        for (int i = 0; i < 128; ++i) {
          error += std::pow(out.get(i) - expected.out[i], 2);
          power += std::pow(expected.out[i], 2);
        }
        CHECK(std::sqrt(error / power) < 2e-2, "%s: %d bits, error %g", kernels->name, bits,
              std::sqrt(error / power));
      }
    }
  }
}

void test_steps_and_mass() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    check_steps(*kernels);
    check_attention_mass(*kernels);
  }
}

}  // namespace

int main() {
  test_decode();
  test_mixed_tiers();
  test_wide_groups();
  test_page_walk();
  test_passed_pages_are_not_fetched();
  test_not_finite();
  test_uneven_values();
  test_steps_and_mass();
  return testing::report("attention");
}
